//! The kernels by themselves: compiled for every architecture without a card, checked against float64 and timed on one.
//!
//! `kernel_check compile`          every kernel by NVRTC for sm_80, sm_89, sm_90a, sm_100a; needs libnvrtc only
//! `kernel_check check time`       on the card at hand: results against plain loops in float64, then rates beside bounds
//! `kernel_check check attention`  sections whose name contains a word
#![allow(unsafe_code)]
#![allow(clippy::print_stdout)]

mod card;
mod chain;
mod check;
mod check_attention;
mod check_edges;
mod check_fused;
mod head;
mod numbers;
mod rotated;
mod time;
mod time_attention;
mod time_decode;
mod time_fused;
mod time_layer;
mod time_products;
mod wide;

use card::{Card, Outcome};
use mserve_runtime::cuda::{compile, cubin, device, kernels, libraries};
use std::process::ExitCode;
use std::time::Instant;

const ARCHITECTURES: [(i32, i32); 4] = [(8, 0), (8, 9), (9, 0), (10, 0)];

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if words.first().is_some_and(|w| w == "compile") {
        return compile_everywhere();
    }
    let card = match Card::open() {
        Ok(card) => card,
        Err(error) => {
            eprintln!("kernel_check: {error}");
            return ExitCode::FAILURE;
        }
    };
    println!("{}", card.describe());
    let mut failed = 0;
    for (name, section) in sections() {
        let (kind, topic) = name.split_once(' ').unwrap_or((name, ""));
        let chosen = |word: &String| word == kind || word == topic || word == name;
        if !words.is_empty() && !words.iter().any(chosen) {
            continue;
        }
        let start = Instant::now();
        println!("\n== {name}");
        if let Err(error) = section(&card) {
            failed += 1;
            println!("FAILED {name}: {error}");
        }
        println!("[{name}: {:.1} s]", start.elapsed().as_secs_f64());
    }
    println!("\n{failed} sections failed");
    if failed > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

type Section = fn(&Card) -> Outcome;

fn sections() -> [(&'static str, Section); 21] {
    [
        ("check rows", check::rows),
        ("check edges", check_edges::all),
        ("check products", check::products),
        ("check fused", check_fused::all),
        ("check wide", wide::check),
        ("check rotated", rotated::check),
        ("check chain", chain::check),
        ("check head", head::check),
        ("check sample", check::sample),
        ("check attention", check_attention::all),
        ("time prefill", time_attention::prefill),
        ("time decode", time_decode::decode),
        ("time layer", time_layer::all),
        ("time products", time_products::all),
        ("time fused", time_fused::all),
        ("time wide", wide::time),
        ("time rotated", rotated::time),
        ("time chain", chain::time),
        ("time head", head::time),
        ("time rows", time::rows),
        ("time sample", time::sample),
    ]
}

fn compile_everywhere() -> ExitCode {
    if let Err(error) = libraries::open(libraries::Library::Nvrtc) {
        eprintln!("kernel_check: {error}");
        return ExitCode::FAILURE;
    }
    let mut failed = 0;
    for capability in ARCHITECTURES {
        let arch = device::arch(capability);
        let start = Instant::now();
        let sources = kernels::sources(&kernels::HEAD_DIMS, capability);
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        match compile::compile_all(&sources, &arch, None, threads) {
            Ok(cubins) => {
                for (source, _) in sources.iter().zip(&cubins).filter(|(s, cubin)| !says_its_parameters(&s.name, cubin))
                {
                    failed += 1;
                    println!("{arch}: {}: the machine code does not say its kernels' parameters", source.name);
                }
            }
            Err(error) => {
                failed += 1;
                println!("{arch}: {error}");
            }
        }
        println!("{arch}: {} compilations, {:.1} s", sources.len(), start.elapsed().as_secs_f64());
    }
    if failed > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// Launches are checked against what the machine code says of its kernels' parameters: of every kernel of the file.
fn says_its_parameters(name: &str, cubin: &[u8]) -> bool {
    let without_head_dim = name.trim_end_matches(|c: char| c.is_ascii_digit()).trim_end_matches('_');
    let file = kernels::file(name).or_else(|| kernels::file(without_head_dim));
    let known = cubin::parameter_sizes(cubin);
    file.is_some_and(|file| file.entries.iter().all(|entry| known.contains_key(*entry)))
}
