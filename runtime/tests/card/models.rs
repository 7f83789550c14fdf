//! Whole models: logits against exact ones, text against the CPU's.

use super::any_device::cpu::Cpu;
use super::any_device::sampling::{as_the_host_chooses, counts_are_kept};
use super::any_device::steps::{Places, margin, random_tokens};
use super::any_device::{Device, Failure, Model, Outcome, Sizes};
use super::closeness::Closeness;
use super::cuda::Cuda;
use super::forced::{Forced, greedy_text, teacher_forced};
use super::specs::{demo, demo_dir, families};
use mserve_runtime::cuda::GraphCapture;
use mserve_runtime::engine::SampledToken;
use serde::Deserialize;
use std::path::Path;

/// Rounding to bf16 after every op leaves 0.6 to 1.6e-4 in these models, and logprobs within 0.06. For other models
/// transformers' own bf16 run is the yardstick, see [`like_transformers`]: it is 1.7 to 25 times as far off as ours.
const NMSE_MOST: f64 = 5e-4;
const LOGPROB_MOST: f64 = 0.15;
/// Of transformers' own distance from its f32 run, in bf16 on the same card.
const TIMES_THEIRS: f64 = 1.5;
/// A text's margin on the CPU below which two tokens may change places.
const MARGIN: f32 = 0.06;

pub fn cpu() -> Cpu {
    Cpu { threads: std::thread::available_parallelism().map_or(1, usize::from) }
}

fn sizes(texts: &[Vec<u32>]) -> (Sizes, Places) {
    let longest = texts.iter().map(Vec::len).max().unwrap_or(1).next_multiple_of(64);
    let places = Places { sequences: texts.len() };
    let total: usize = texts.iter().map(Vec::len).sum();
    let (max_num_seqs, num_blocks) = (texts.len(), places.blocks(longest));
    (Sizes { max_model_len: longest, max_num_seqs, max_num_batched_tokens: total.max(64), num_blocks }, places)
}

/// Room for both.
fn covering(a: Sizes, b: Sizes) -> Sizes {
    Sizes {
        max_model_len: a.max_model_len.max(b.max_model_len),
        max_num_seqs: a.max_num_seqs.max(b.max_num_seqs),
        max_num_batched_tokens: a.max_num_batched_tokens.max(b.max_num_batched_tokens),
        num_blocks: a.num_blocks.max(b.num_blocks),
    }
}

/// Logits of the card against the CPU's in f32, from the same bf16 weights: a few texts of all lengths, and decode steps
/// of many rows, since few rows and many have kernels of their own.
pub fn like_the_cpu(card: &Cuda) -> Outcome {
    let batches = [vec![5, 130, 64, 300, 1], vec![11; 12], vec![9; 27], vec![9; 50], vec![9; 100]];
    for model in families() {
        let vocab = model.spec.vocab_size as usize;
        let texts = |lens: &Vec<u64>| -> Vec<Vec<u32>> {
            (1..).zip(lens).map(|(seed, &len)| random_tokens(seed, len as usize, vocab)).collect()
        };
        let batches: Vec<_> = batches.iter().map(texts).collect();
        let largest = batches.iter().map(|texts| sizes(texts).0).reduce(covering);
        let sizes_of_all = largest.ok_or("no batches")?;
        let mut on_cpu = cpu().load(&model, sizes_of_all)?;
        let exact: Vec<Forced> =
            batches.iter().map(|texts| teacher_forced(&mut on_cpu, texts, sizes(texts).1)).collect::<Result<_, _>>()?;
        for graphs in [GraphCapture::WhenNeeded, GraphCapture::Never] {
            let mut on_card = Cuda { name: card.name.clone(), graphs }.load(&model, sizes_of_all)?;
            for (texts, exact) in batches.iter().zip(&exact) {
                let ours = teacher_forced(&mut on_card, texts, sizes(texts).1)?;
                let closeness = close(&ours, |text, at| exact[text][at].1.clone());
                let what = format!("{}, {} texts, {graphs:?}: {closeness}", model.name, texts.len());
                println!("{what}");
                if closeness.nmse() > NMSE_MOST || closeness.worst_logprob > LOGPROB_MOST {
                    return Err(format!("{what}; at most {NMSE_MOST:e} and {LOGPROB_MOST} are right").into());
                }
            }
        }
    }
    Ok(())
}

/// Every kernel of every head size, graph and launches, in seconds: for tools that watch each access.
pub fn every_kernel(card: &Cuda) -> Outcome {
    for model in families() {
        let texts = |lens: &[u64]| -> Vec<Vec<u32>> {
            lens.iter().map(|&n| random_tokens(n, n as usize, model.spec.vocab_size as usize)).collect()
        };
        let batches = [texts(&[3, 40, 1]), texts(&[4; 13]), texts(&[3; 30]), texts(&[3; 70])];
        let largest = batches.iter().map(|texts| sizes(texts).0).reduce(covering).ok_or("no batches")?;
        for graphs in [GraphCapture::WhenNeeded, GraphCapture::Never] {
            let mut on_card = Cuda { name: card.name.clone(), graphs }.load(&model, largest)?;
            for texts in &batches {
                let rows = teacher_forced(&mut on_card, texts, sizes(texts).1)?;
                if !rows.iter().flatten().flat_map(|(_, row)| row).all(|x| x.is_finite()) {
                    return Err(format!("{}, {graphs:?}: logits that are no numbers", model.name).into());
                }
            }
        }
        as_the_host_chooses(card, &model, 6, 3)?;
        counts_are_kept(card, &model, 3)?;
    }
    Ok(())
}

/// `exact` of (text, number of the row found for it).
fn close(ours: &Forced, exact: impl Fn(usize, usize) -> Vec<f32>) -> Closeness {
    let mut closeness = Closeness::default();
    for (text, rows) in ours.iter().enumerate() {
        for (at, (_, row)) in rows.iter().enumerate() {
            closeness.add(row, &exact(text, at));
        }
    }
    closeness
}

/// Every model under `dir`, which `make_card_goldens.py` wrote: no farther from transformers' f32 logits than
/// transformers' own bf16 logits are, within a factor.
pub fn like_transformers(card: &Cuda, dir: &Path) -> Outcome {
    let mut models: Vec<_> = std::fs::read_dir(dir)?.collect::<Result<Vec<_>, _>>()?;
    models.retain(|entry| entry.path().join("f32.bin").exists());
    models.sort_by_key(std::fs::DirEntry::file_name);
    if models.is_empty() {
        return Err(format!("{} holds no models of make_card_goldens.py", dir.display()).into());
    }
    let mut failed = Vec::new();
    for entry in models {
        if let Err(error) = one_like_transformers(card, &entry.path()) {
            println!("{error}");
            failed.push(entry.file_name());
        }
    }
    if failed.is_empty() { Ok(()) } else { Err(format!("too far off: {failed:?}").into()) }
}

fn one_like_transformers(card: &Cuda, dir: &Path) -> Outcome {
    let model = Model::from_checkpoint(dir)?;
    let texts: Vec<Vec<u32>> = serde_json::from_slice(&std::fs::read(dir.join("input_ids.json"))?)?;
    let (sizes, places) = sizes(&texts);
    let vocab = model.spec.vocab_size as usize;
    let mut begins = vec![0];
    begins.extend(texts.iter().scan(0, |sum, text| {
        *sum += text.len();
        Some(*sum)
    }));
    let (exact, theirs) = (floats(&dir.join("f32.bin"))?, floats(&dir.join("bf16.bin"))?);
    let row = |of: &[f32], text: usize, position: usize| of[(begins[text] + position) * vocab..][..vocab].to_vec();
    let ours = teacher_forced(&mut card.load(&model, sizes)?, &texts, places)?;
    let f32_run = teacher_forced(&mut cpu().load(&model, sizes)?, &texts, places)?;
    let exact_row = |text: usize, at: usize| row(&exact, text, ours[text][at].0);
    let (card, cpu) = (close(&ours, exact_row), close(&f32_run, exact_row));
    let same_rows = ours.iter().enumerate().map(|(text, rows)| {
        rows.iter().map(|(position, _)| (*position, row(&theirs, text, *position))).collect::<Vec<_>>()
    });
    let theirs = close(&same_rows.collect(), exact_row);
    let ratio = card.nmse() / theirs.nmse();
    println!("{}: card {card}\n    transformers in bf16 {theirs}\n    CPU {cpu}\n    {ratio:.2} of theirs", model.name);
    if ratio > TIMES_THEIRS || card.worst_logprob > theirs.worst_logprob * 2.0 + 0.02 || cpu.nmse() > 1e-8 {
        return Err(format!("{}: {ratio:.2} times as far as transformers in bf16", model.name).into());
    }
    Ok(())
}

fn floats(path: &Path) -> Result<Vec<f32>, Failure> {
    let bytes = std::fs::read(path)?;
    Ok(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
}

/// Greedy text of the bundled model: the golden line is wholly the CPU's; other texts are up to the first place where
/// the CPU itself was as good as undecided.
pub fn text_like_the_cpu(card: &Cuda) -> Outcome {
    let golden: serde_json::Value = serde_json::from_slice(&std::fs::read(demo_dir().join("golden.json"))?)?;
    let ids: Vec<u32> = Deserialize::deserialize(&golden["token_ids"])?;
    let model = demo()?;
    let sizes = Sizes { max_model_len: 512, max_num_seqs: 1, max_num_batched_tokens: 512, num_blocks: 32 };
    let (mut on_card, mut on_cpu) = (card.load(&model, sizes)?, cpu().load(&model, sizes)?);
    let vocab = model.spec.vocab_size as usize;
    let golden_prompt = 6;
    let mut prompts = vec![(ids[..golden_prompt].to_vec(), ids.len() - golden_prompt)];
    prompts.extend([5, 7, 20, 40].map(|len| (ids[..len].to_vec(), 100)));
    prompts.extend([3, 9, 60, 200].map(|len| (random_tokens(len, len as usize, vocab), 60)));
    for (number, (prompt, count)) in prompts.iter().enumerate() {
        let wanted = greedy_text(&mut on_cpu, prompt, *count)?;
        let found = greedy_text(&mut on_card, prompt, *count)?;
        let equal = wanted.iter().zip(&found).take_while(|(a, b)| a.token_id == b.token_id).count();
        println!("prompt of {}: {equal} of {count} as on the CPU{}", prompt.len(), parting(&wanted, &found, equal));
        let bound = if number == 0 { 0.0 } else { MARGIN };
        if wanted.get(equal).is_some_and(|token| margin(token) > bound) {
            return Err(format!("text {number} is another after {equal} tokens").into());
        }
    }
    Ok(())
}

fn parting(wanted: &[SampledToken], found: &[SampledToken], at: usize) -> String {
    let worst =
        wanted.iter().zip(found).take(at).filter_map(|(a, b)| Some((a.logprob?.logprob - b.logprob?.logprob).abs()));
    let worst = worst.fold(0.0, f32::max);
    match (wanted.get(at), found.get(at)) {
        (Some(a), Some(b)) => format!(
            "; logprobs within {worst:.4}; then {:?} (margin {:.4}) became {:?} (margin {:.4})",
            a.top_logprobs,
            margin(a),
            b.top_logprobs,
            margin(b)
        ),
        _ => format!("; logprobs within {worst:.4}"),
    }
}
