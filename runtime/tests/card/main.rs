//! The runtime on a card: the whole of it, through engine and backend. One command on a machine with one:
//!
//!     cargo test --release -p mserve-runtime --test card
//!
//! Without a card it says so and passes; `--require-card` makes that a failure. Words choose sections (`-- text soak`).
//! `transformers DIR` compares with the logits that `tests/fixtures/make_card_goldens.py DIR` wrote.
#![allow(clippy::print_stdout)]

mod any_device;
mod closeness;
mod cuda;
mod forced;
mod models;
mod specs;

use any_device::soak::{Load, soak};
use any_device::texts::{Asks, neighbours_change_nothing, penalised_texts_are_those_by_hand, same_however_computed};
use any_device::{Model, Outcome, Sizes, sampling};
use cuda::Cuda;
use mserve_planner::model::Family;
use specs::{decoder, demo, random};
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

type Section = fn(&Cuda) -> Outcome;

const SECTIONS: [(&str, Section); 9] = [
    ("kernels", models::every_kernel),
    ("text", models::text_like_the_cpu),
    ("neighbours", neighbours),
    ("same", same),
    ("logits", models::like_the_cpu),
    ("choices", choices),
    ("shares", shares),
    ("counts", counts),
    ("soak", mixed_load),
];

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let has = |word: &str| words.iter().any(|w| w == word);
    let card = Cuda::open();
    if has("--list") {
        // What a test runner shows in place of output that it hides. It asks for the ignored ones too: there are none.
        if !has("--ignored") {
            println!("{}: test", if card.is_ok() { "card" } else { "card_skipped_there_is_none" });
        }
        return ExitCode::SUCCESS;
    }
    let card = match card {
        Ok(card) => card,
        Err(why) => {
            println!("card: SKIPPED, nothing was tested: {why}");
            return if has("--require-card") { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
    };
    println!("{}", card.name);
    let goldens = words.iter().position(|w| w == "transformers").and_then(|at| words.get(at + 1));
    let chosen = |name: &str| has(name) || !SECTIONS.iter().any(|(other, _)| has(other)) && !has("transformers");
    let mut failed = Vec::new();
    if let Some(dir) = goldens {
        run("transformers", &mut failed, || models::like_transformers(&card, Path::new(dir)));
    }
    for (name, section) in SECTIONS.iter().filter(|(name, _)| chosen(name)) {
        run(name, &mut failed, || section(&card));
    }
    println!("\nfailed: {failed:?}");
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// One that fails does not keep the next from running.
fn run(name: &str, failed: &mut Vec<String>, section: impl FnOnce() -> Outcome) {
    println!("\n== {name}");
    let begin = Instant::now();
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(section));
    let outcome = result.unwrap_or_else(|_| Err("it panicked".into()));
    let seconds = begin.elapsed().as_secs_f64();
    match outcome {
        Ok(()) => println!("[{name}: ok, {seconds:.1} s]"),
        Err(error) => {
            println!("[{name}: FAILED after {seconds:.1} s: {error}]");
            failed.push(name.to_owned());
        }
    }
}

fn neighbours(card: &Cuda) -> Outcome {
    specs::families().iter().try_for_each(|model| neighbours_change_nothing(card, model, &[2, 8, 16, 30, 64, 90]))
}

fn same(card: &Cuda) -> Outcome {
    let sizes = Sizes { max_model_len: 1024, max_num_seqs: 16, max_num_batched_tokens: 2048, num_blocks: 512 };
    for model in [demo()?, random("llama 128", decoder(Family::Llama, (8, 2, 128), 512, 5000, 2))] {
        println!("-- {}", model.name);
        let lens = [33, 7, 150, 300, 64, 1, 16, 500, 90, 17, 260, 31];
        let asks = Asks::random(&lens, model.spec.vocab_size as usize, 48);
        same_however_computed(card, &model, sizes, &asks)?;
    }
    Ok(())
}

/// A real distribution, and one whose vocabulary no vector divides.
fn sampled_models() -> Result<[Model; 2], any_device::Failure> {
    Ok([demo()?, random("odd vocabulary", decoder(Family::Qwen3, (2, 1, 64), 128, 32_003, 1))])
}

fn choices(card: &Cuda) -> Outcome {
    sampled_models()?.iter().try_for_each(|model| sampling::as_the_host_chooses(card, model, 128, 40))
}

fn shares(card: &Cuda) -> Outcome {
    sampled_models()?.iter().try_for_each(|model| sampling::shares_are_right(card, model, 256, 80))
}

fn counts(card: &Cuda) -> Outcome {
    sampled_models()?.iter().try_for_each(|model| sampling::counts_are_kept(card, model, 60))?;
    sampled_models()?.iter().try_for_each(|model| penalised_texts_are_those_by_hand(card, model, 40))
}

fn mixed_load(card: &Cuda) -> Outcome {
    let sizes = Sizes { max_model_len: 512, max_num_seqs: 64, max_num_batched_tokens: 512, num_blocks: 1024 };
    let load =
        Load { requests: 10_000, clients: 96, longest_prompt: 160, longest_output: 40, num_blocks: 220, repeated: 200 };
    soak(card, &demo()?, sizes, load)
}
