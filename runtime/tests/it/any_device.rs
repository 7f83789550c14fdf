//! The checks of `tests/card`, in small, on the CPU: they can be trusted on a card because they hold here exactly.
#![allow(clippy::unwrap_used)]

#[path = "../card/any_device/mod.rs"]
mod checks;

use checks::cpu::Cpu;
use checks::soak::{Load, soak};
use checks::texts::{Asks, neighbours_change_nothing, penalised_texts_are_those_by_hand, same_however_computed};
use checks::{Model, Sizes, sampling};

const CPU: Cpu = Cpu { threads: 2 };

fn model(name: &str) -> Model {
    Model::from_checkpoint(&super::cpu::steps::golden_dir(name)).unwrap()
}

#[test]
fn a_text_is_the_same_however_it_is_computed() {
    let sizes = Sizes { max_model_len: 256, max_num_seqs: 8, max_num_batched_tokens: 512, num_blocks: 128 };
    for name in ["mistral", "qwen3"] {
        let asks = Asks::random(&[33, 7, 100, 64, 1, 16, 140], 128, 20);
        same_however_computed(&CPU, &model(name), sizes, &asks).unwrap();
        neighbours_change_nothing(&CPU, &model(name), &[2, 5]).unwrap();
    }
}

#[test]
fn mixed_requests_leave_nothing_behind() {
    let sizes = Sizes { max_model_len: 256, max_num_seqs: 16, max_num_batched_tokens: 64, num_blocks: 256 };
    let load =
        Load { requests: 400, clients: 24, longest_prompt: 60, longest_output: 20, num_blocks: 30, repeated: 40 };
    soak(&CPU, &model("llama"), sizes, load).unwrap();
}

#[test]
fn penalties_are_those_of_all_that_was_generated() {
    penalised_texts_are_those_by_hand(&CPU, &model("qwen2"), 30).unwrap();
}

#[test]
fn tokens_are_chosen_as_the_host_sampler_does() {
    sampling::as_the_host_chooses(&CPU, &model("llama"), 16, 10).unwrap();
    sampling::counts_are_kept(&CPU, &model("llama"), 12).unwrap();
}

#[test]
fn shares_of_tokens_are_as_the_parameters_say() {
    sampling::shares_are_right(&CPU, &model("qwen3"), 64, 40).unwrap();
}
