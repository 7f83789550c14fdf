//! Lines that vLLM and SGLang printed on real machines, against ours: every row of `kv_logs.csv`.
//!
//! A row counts as reproduced when the model's geometry, with the pool that the row prints (within the digits printed),
//! gives the very tokens, blocks, concurrency or bytes that it prints. Where that takes a flag that the row does not
//! state, it counts apart; so do rows whose figures only have to agree with one another. The others say why not.
#![allow(clippy::unwrap_used)]

use crate::fixtures;
use mserve_planner::engine::sglang::Cell;
use mserve_planner::engine::vllm::{Groups, MambaBlocks, PoolOptions, PrintRule, Printed};
use mserve_planner::engine::{Engine, EngineBudget, EngineSettings, Version, parse_boot_log};
use mserve_planner::memory::KvFormat;
use mserve_planner::model::{DType, ModelSpec, families, parse_config};
use mserve_planner::units::GIB;
use std::collections::BTreeMap;

const CSV: &str = include_str!("../fixtures/kv_logs.csv");

/// What a row is checked by.
enum Check {
    /// The printed pool gives the printed tokens (and concurrency); `len` where the row does not say it.
    Tokens { len: Option<u64> },
    /// The printed pool gives the printed number of blocks.
    Blocks,
    /// Bytes needed for `max_model_len`, and the longest length that the pool holds.
    Needed,
    /// Blocks of 4 or 8 GiB of swap on the host.
    CpuBlocks { swap_gib: u64 },
    /// No pool printed: blocks, tokens and concurrency agree with one another.
    Agree,
    /// Its figures come from the formulas of a start, by a test below, within what those are good for.
    Predicted,
    /// Not enough facts, or an engine that counts otherwise.
    Listed(&'static str),
}

/// What a reproduced row rests on.
#[derive(Clone, Copy, PartialEq)]
enum RestsOn {
    /// On what it says, and on the model.
    Facts,
    /// On flags that it does not say; they were found by trying which explain it to the last digit.
    Assumption,
    /// On itself: no geometry in it.
    Itself,
}
use Check::{Agree, Blocks, CpuBlocks, Listed, Needed, Predicted, Tokens};

/// Line of the CSV, part of its model's name, the model, how the pool is laid out, the check.
type Row = (usize, &'static str, Model, fn(PoolOptions) -> PoolOptions, Check);

enum Model {
    Corpus(&'static str),
    /// Architecture, layers, heads, KV heads, head size.
    Uniform(&'static str, u64, u64, u64, u64),
    Gemma2_9b,
    None,
}
use Model::{Corpus, Gemma2_9b, Uniform};

fn plain(options: PoolOptions) -> PoolOptions {
    options
}

fn fp8(options: PoolOptions) -> PoolOptions {
    PoolOptions { kv: DType::F8E4M3.into(), ..options }
}

const UNNAMED: &str = "the model is not named or its config is not published here";
const NO_POOL: &str = "the size of the pool is not printed";
const V4: &str = "windows and compressor states take blocks by max_num_batched_tokens, which the row does not say";
const BREAKDOWN: &str = "a breakdown of memory without blocks or tokens";

#[rustfmt::skip]
const ROWS: &[Row] = &[
    (2, "GLM-5.3-Flash", Model::None, plain, Listed(UNNAMED)),
    (3, "Qwen3-0.6B", Corpus("Qwen__Qwen3-0.6B"), plain, Agree),
    (4, "Kimi-K3", Corpus("moonshotai__Kimi-K3"), |o| PoolOptions { mamba_blocks: MambaBlocks::None, ..o }, Tokens { len: None }),
    (5, "Llama-3.1-70B", Model::None, plain, Predicted),
    (6, "CodeLlama-13B", Uniform("LlamaForCausalLM", 40, 40, 40, 128), plain, CpuBlocks { swap_gib: 8 }),
    (7, "DeepSeek-V4-Flash", Model::None, plain, Listed(V4)),
    (8, "Llama-3.1-70B", Model::None, plain, Predicted),
    (9, "gemma", Gemma2_9b, plain, Needed),
    (10, "Qwen3.8-27B", Model::None, plain, Listed(BREAKDOWN)),
    // KV type, state type and speculation are not in the row; these explain its tokens to the last digit.
    (11, "Qwen3.x-27B", Corpus("nvidia__Qwen3.6-27B-NVFP4"), |o| PoolOptions { conv_dtype: Some(DType::F32), ..fp8(o) }, Tokens { len: None }),
    (12, "DeepSeek-V4-Flash", Model::None, plain, Listed(V4)),
    // State in bf16, which the row does not say; both of its figures follow.
    (13, "Qwen3.x-27B", Corpus("nvidia__Qwen3.6-27B-NVFP4"), |o| PoolOptions { state_dtype: Some(DType::BF16), ..fp8(o) }, Needed),
    (14, "DeepSeek-R1-Distill-Qwen-32B", Uniform("Qwen2ForCausalLM", 64, 40, 8, 128), plain, Needed),
    (15, "DeepSeek-V4-Flash", Model::None, plain, Listed(V4)),
    (16, "DeepSeek-V4-Flash", Model::None, plain, Listed(V4)),
    (17, "GLM-5.3-FP8", Corpus("zai-org__GLM-5.3-FP8"), |o| PoolOptions { kv: KvFormat { dtype: DType::F8E4M3, fp8_ds_mla: false }, block_size_tokens: 64, ..o }, Agree),
    (18, "Qwen3-4B", Corpus("Qwen__Qwen3-4B"), plain, Blocks),
    (19, "DeepSeek-V4.1", Model::None, plain, Listed(UNNAMED)),
    (20, "Qwen3-32B", Model::None, plain, Predicted),
    (21, "Kimi-K2-Thinking", Corpus("moonshotai__Kimi-K2-Instruct"), |o| PoolOptions { block_size_tokens: 64, decode_context_parallel_size: 8, ..o }, Tokens { len: Some(262_144) }),
    (22, "GLM-5.3-Flash", Model::None, plain, Listed(UNNAMED)),
    (23, "Mistral-Small-3.2", Uniform("MistralForCausalLM", 40, 32, 8, 128), |o| PoolOptions { block_size_tokens: 128, ..o }, Tokens { len: None }),
    (24, "Qwen3-Coder-30B", Corpus("Qwen__Qwen3-30B-A3B-Instruct-2507"), plain, Needed),
    (25, "Qwen2.5-3B", Uniform("Qwen2ForCausalLM", 36, 16, 2, 128), plain, Agree),
    // A block of 1,568 tokens says fp8 KV and float32 states; 131,072 is the length that explains the tokens.
    (26, "Qwen3.x-27B", Corpus("nvidia__Qwen3.6-27B-NVFP4"), fp8, Tokens { len: Some(131_072) }),
    (27, "Qwen3-0.6B", Model::None, plain, Predicted),
    (28, "Qwen3-VL-32B", Model::None, plain, Listed("another engine, and its commenters dispute the number of layers")),
    (29, "not named", Model::None, plain, Agree),
    (30, "Qwen3-8B", Model::None, plain, Listed(NO_POOL)),
    (31, "Llama-2-7b", Model::None, plain, Predicted),
    (32, "Qwen2.5-7B", Model::None, plain, Predicted),
    (33, "Qwen3-1.7B", Corpus("Qwen__Qwen3-1.7B"), plain, Agree),
    (34, "Qwen3-14B", Uniform("Qwen3ForCausalLM", 40, 40, 8, 128), plain, Tokens { len: None }),
    (35, "Qwen3-0.6B", Corpus("Qwen__Qwen3-0.6B"), plain, Needed),
    (36, "Kimi-K2.5", Corpus("moonshotai__Kimi-K2.6"), plain, Tokens { len: None }),
    (37, "Phi-4-mini", Uniform("Phi3ForCausalLM", 32, 24, 8, 128), plain, Blocks),
    (38, "DeepSeek-V4-Flash-Base", Model::None, plain, Listed(V4)),
    (39, "granite-4.2-3b", Uniform("GraniteForCausalLM", 41, 40, 8, 64), plain, Tokens { len: Some(131_072) }),
    (40, "Llama-3.1-8B", Corpus("meta-llama__Llama-3.1-8B-Instruct"), plain, Blocks),
    (41, "Llama-2-7b", Corpus("meta-llama__Llama-2-7b-hf"), plain, Agree),
    (42, "Llama-4-Scout", Corpus("meta-llama__Llama-4-Scout-17B-16E-Instruct"), plain, Needed),
    (43, "Qwen2.5-72B", Corpus("Qwen__Qwen2.5-72B"), plain, Blocks),
    (44, "Qwen3-235B-A22B-FP8", Model::None, plain, Listed("the pool of one worker is printed, the blocks are those of the smallest: 1.1 % apart")),
    (45, "Mistral-Nemo", Model::None, plain, Predicted),
    (46, "Qwen2.5-0.5B", Uniform("Qwen2ForCausalLM", 24, 14, 2, 64), plain, Tokens { len: None }),
    (47, "Mistral-Nemo", Model::None, plain, Predicted),
    // Two speculative tokens and their draft layer, which the row does not say; its tokens follow to the last digit.
    (48, "Qwen3.x-27B", Corpus("nvidia__Qwen3.6-27B-NVFP4"), |o| PoolOptions { speculative_tokens: 2, draft_layers: 1, ..o }, Tokens { len: None }),
    (49, "Qwen3-8B", Corpus("Qwen__Qwen3-8B"), plain, Agree),
    (50, "Llama-3.2-3B", Uniform("LlamaForCausalLM", 28, 24, 8, 128), plain, Blocks),
    (51, "Ministral-3-14B", Uniform("MistralForCausalLM", 40, 32, 8, 128), plain, Tokens { len: None }),
];

/// Lines whose flags were found by trying.
const ASSUMED: [usize; 5] = [11, 13, 26, 39, 48];

fn rests(line: usize, check: &Check) -> RestsOn {
    match check {
        // Line 17 also states the bytes of a request.
        Agree if line != 17 => RestsOn::Itself,
        _ if ASSUMED.contains(&line) => RestsOn::Assumption,
        _ => RestsOn::Facts,
    }
}

/// A row's columns by name.
fn columns(line: &str) -> BTreeMap<&'static str, String> {
    let header = CSV.lines().next().unwrap().split(',');
    header.zip(fixtures::csv_fields(line)).collect()
}

impl Model {
    fn spec(&self) -> Option<ModelSpec> {
        let config = |text: String| Some(parse_config(text.as_bytes()).unwrap_or_else(|e| panic!("{text}: {e}")));
        match self {
            Self::None => None,
            Corpus(name) => Some(fixtures::spec(name)),
            Uniform(architecture, layers, heads, kv_heads, head_dim) => config(format!(
                r#"{{"architectures":["{architecture}"],"hidden_size":{},"num_hidden_layers":{layers},
                "num_attention_heads":{heads},"num_key_value_heads":{kv_heads},"head_dim":{head_dim},
                "intermediate_size":1024,"vocab_size":32000,"max_position_embeddings":1048576,
                "torch_dtype":"bfloat16"}}"#,
                heads * head_dim
            )),
            Gemma2_9b => config(
                r#"{"architectures":["Gemma2ForCausalLM"],"hidden_size":3584,"num_hidden_layers":42,
                "num_attention_heads":16,"num_key_value_heads":8,"head_dim":256,"intermediate_size":14336,
                "vocab_size":256000,"max_position_embeddings":8192,"sliding_window":4096,"torch_dtype":"bfloat16"}"#
                    .to_owned(),
            ),
        }
    }
}

/// Sizes that print as `text` does; one decimal more of slack where a user cut a digit off.
fn sizes(text: &str) -> std::ops::RangeInclusive<u64> {
    let printed: f64 = text.parse().unwrap();
    let decimals = text.split_once('.').map_or(0, |(_, d)| d.len());
    let half = 0.5 * 10_f64.powi(-(decimals as i32));
    let bytes = |gib: f64| (gib * GIB as f64) as u64;
    bytes(printed - half)..=bytes(printed + half)
}

fn number(row: &BTreeMap<&str, String>, name: &str) -> Option<u64> {
    row[name].parse::<f64>().ok().map(|n| n as u64)
}

/// Whether `exact`, cut to the digits of `printed`, is what was printed.
fn prints_as(exact: f64, printed: &str) -> bool {
    let decimals = printed.split_once('.').map_or(0, |(_, d)| d.len());
    let cut = (exact * 10_f64.powi(decimals as i32)).floor() / 10_f64.powi(decimals as i32);
    format!("{exact:.decimals$}") == printed || format!("{cut:.decimals$}") == printed
}

fn concurrency_prints(row: &BTreeMap<&str, String>, exact: f64) -> bool {
    let printed = &row["max_concurrency"];
    printed.is_empty() || prints_as(exact, printed)
}

fn reproduced(row: &BTreeMap<&str, String>, spec: &ModelSpec, options: PoolOptions, check: &Check) -> bool {
    let groups = Groups::new(spec, options);
    let len = number(row, "max_model_len");
    let pools = || {
        let sizes = sizes(&row["available_kv_gib"]);
        groups.num_blocks(*sizes.start())..=groups.num_blocks(*sizes.end())
    };
    match check {
        Listed(_) | Predicted => false,
        Tokens { .. } if row["engine"] == "sglang" => {
            let bytes =
                Cell::new(spec, options.tensor_parallel_size, options.kv).bytes(number(row, "kv_tokens").unwrap());
            sizes(&row["available_kv_gib"]).contains(&bytes)
        }
        Tokens { len: stated } => {
            let len = len.or(*stated).unwrap();
            let printed = |blocks| Printed::of_blocks(&groups, blocks, len, PrintRule::ConcurrencyTimesLength, 0);
            let tokens = number(row, "kv_tokens").unwrap();
            let block =
                number(row, "block_size").is_none_or(|b| groups.groups.iter().any(|g| g.block_size_tokens == b));
            // An extra block of slack: users cut digits of the pool's size.
            let found = (*pools().start()..=*pools().end() + 1).map(printed).find(|p| p.tokens == tokens);
            block && found.is_some_and(|p| concurrency_prints(row, p.concurrency))
        }
        Blocks => {
            let blocks = number(row, "gpu_blocks").unwrap();
            let swap = number(row, "cpu_blocks").is_none_or(|cpu| 4 * GIB / groups.bytes_per_block == cpu);
            let tokens = (blocks * options.block_size_tokens) as f64;
            pools().contains(&blocks) && swap && concurrency_prints(row, tokens / len.unwrap() as f64)
        }
        Needed => {
            let len = len.unwrap();
            let needed = prints_as(groups.needed_bytes(len) as f64 / GIB as f64, &row["needed_gib_for_max_len"]);
            let longest = number(row, "estimated_max_len").is_none_or(|printed| {
                // Rounded up to whole blocks.
                let block = groups.groups[0].block_size_tokens;
                pools().any(|blocks| {
                    groups.longest(blocks * groups.bytes_per_block, len).next_multiple_of(block).abs_diff(printed) == 0
                })
            });
            needed && longest
        }
        CpuBlocks { swap_gib } => {
            // Noted in words: 1,310 blocks on the host.
            swap_gib * GIB / groups.bytes_per_block == 1310 && row["notes"].contains("# CPU blocks 1310")
        }
        Agree => agree(row, options.block_size_tokens) && request_of_a_million(row, &groups),
    }
}

/// Blocks times block size are the tokens, and tokens over the length are the concurrency.
fn agree(row: &BTreeMap<&str, String>, block: u64) -> bool {
    let tokens = number(row, "kv_tokens").unwrap();
    let of_blocks = number(row, "gpu_blocks").is_none_or(|blocks| blocks * block == tokens);
    let concurrency =
        number(row, "max_model_len").is_none_or(|len| concurrency_prints(row, tokens as f64 / len as f64));
    tokens.is_multiple_of(block) && of_blocks && concurrency
}

/// GLM-5.3: a request of 1,048,576 tokens takes 46.58 GiB by the log.
fn request_of_a_million(row: &BTreeMap<&str, String>, groups: &Groups) -> bool {
    !row["notes"].contains("46.58 GiB") || prints_as(groups.needed_bytes(1_048_576) as f64 / GIB as f64, "46.58")
}

#[test]
fn engines_logs_are_reproduced_or_listed() {
    let lines: Vec<&str> = CSV.lines().collect();
    assert_eq!(ROWS.len(), lines.len() - 1, "every row has an entry");
    let (mut on_facts, mut on_assumption, mut on_itself, mut predicted, mut different) = (0, 0, 0, 0, Vec::new());
    for (line, name, model, layout, check) in ROWS {
        let row = columns(lines[line - 1]);
        assert!(row["model"].contains(name), "line {line} is {}", row["model"]);
        let options = layout(PoolOptions::new(number(&row, "tp").unwrap_or(1), DType::BF16));
        let ok = match (check, model.spec()) {
            (Listed(reason), _) => {
                println!("line {line:2}  listed                       {}: {reason}", row["model"]);
                continue;
            }
            (Predicted, _) => {
                println!("line {line:2}  predicted                    {}", row["model"]);
                predicted += 1;
                continue;
            }
            (check, Some(spec)) => reproduced(&row, &spec, options, check),
            (_, None) => agree(&row, options.block_size_tokens),
        };
        let (word, count) = match rests(*line, check) {
            RestsOn::Facts => ("reproduced                 ", &mut on_facts),
            RestsOn::Assumption => ("reproduced on an assumption", &mut on_assumption),
            RestsOn::Itself => ("agrees with itself         ", &mut on_itself),
        };
        if ok {
            *count += 1;
        } else {
            different.push(format!("line {line}: {}", row["model"]));
        }
        println!("line {line:2}  {}  {}", if ok { word } else { "DIFFERENT                  " }, row["model"]);
    }
    let all = ROWS.len();
    println!(
        "of {all} rows: {on_facts} reproduced, {on_assumption} with a flag assumed, {on_itself} agree with themselves, \
         {predicted} predicted by the formulas, {} listed",
        all - on_facts - on_assumption - on_itself - predicted
    );
    assert!(different.is_empty(), "{different:?}");
    assert_eq!(predicted, CAPACITY.len() + BREAKDOWNS.len(), "each of them is in a table below");
    assert!(on_facts >= 19 && on_assumption >= 5 && on_itself >= 6, "{on_facts} {on_assumption} {on_itself}");
}

/// DeepSeek-V4-Flash: one pool of 32.08 GiB printed 90,841 tokens at 4,096 and 2,175,276 at 262,144. The step's size is
/// not known; the usual 8,192 tokens come within a tenth of both.
#[test]
fn deepseek_v4_is_fixed_and_slope() {
    let spec = fixtures::spec("deepseek-ai__DeepSeek-V4-Flash");
    let groups = Groups::new(&spec, PoolOptions::new(2, DType::F8E4M3));
    assert_eq!((groups.groups.len(), groups.bytes_per_block), (5, 21 * 37_440 + 20 * 1_728 + 21 * 8_640));
    for (len, tokens) in [(4_096, 90_841), (262_144, 2_175_276)] {
        let pool = (32.08 * GIB as f64) as u64;
        let printed = Printed::new(&groups, pool, len, PrintRule::ConcurrencyTimesLength);
        assert!((printed.tokens as f64 / f64::from(tokens) - 1.0).abs() < 0.1, "{len}: {} {tokens}", printed.tokens);
    }
}

/// H100 rows with the terms of vLLM 0.11's memory and no tokens, at 1,024 sequences of at most 16,000 tokens: line,
/// config, TP, then GiB: weights, peak activations, KV.
const BREAKDOWNS: &[(usize, &str, u64, [f64; 3])] =
    &[(20, "Qwen__Qwen3-32B", 2, [30.59, 5.64, 34.49]), (27, "Qwen__Qwen3-0.6B", 1, [1.12, 5.56, 64.45])];

#[test]
fn terms_of_a_start_are_predicted() {
    let lines: Vec<&str> = CSV.lines().collect();
    for &(line, config, tp, [weights, peak, kv]) in BREAKDOWNS {
        let row = columns(lines[line - 1]);
        assert_eq!((&row["model_load_gib"], &row["available_kv_gib"]), (&format!("{weights}"), &format!("{kv}")));
        assert!(row["notes"].contains(&format!("activation {peak}")), "{}", row["notes"]);
        let spec = fixtures::spec(config);
        let settings = EngineSettings {
            version: Version::new(0, 11, 0),
            ..EngineSettings::new(Engine::Vllm, (79.18 * GIB as f64) as u64, 16_000, PoolOptions::new(tp, DType::BF16))
        };
        let budget = EngineBudget::new(&families::whole_layers(&spec), &spec, &settings, None);
        let term = |name: &str| budget.terms.iter().find(|t| t.name == name).unwrap().bytes as f64 / GIB as f64;
        let ours = [term("weights"), term("peak activations"), budget.kv_bytes as f64 / GIB as f64];
        println!("line {line}: {ours:.2?} GiB, logged {:.2?}", [weights, peak, kv]);
        assert!((ours[0] / weights - 1.0).abs() < 0.01, "{ours:?}");
        assert!((ours[1] / peak - 1.0).abs() < 0.02, "{ours:?}");
        assert!((ours[2] - kv).abs() < 0.3, "{ours:?}");
    }
}

/// H100 rows with blocks and no pool: config or geometry, TP, blocks of 16 tokens. The flags are those of the other
/// rows of their source: 0.9 of 79.18 GiB, 256 sequences.
const CAPACITY: &[(&str, u64, u64, u64)] = &[
    ("meta-llama__Meta-Llama-3.1-70B", 4, 2048, 30_425),
    ("meta-llama__Meta-Llama-3.1-70B", 4, 8192, 30_251),
    ("meta-llama__Llama-2-7b-hf", 1, 2048, 7_463),
    ("Qwen__Qwen2.5-7B-Instruct", 1, 1024, 65_368),
    ("mistralai__Mistral-Nemo-Instruct-2407", 2, 1024, 48_009),
    ("mistralai__Mistral-Nemo-Instruct-2407", 1, 2048, 19_251),
];

#[test]
fn capacities_are_predicted_within_two_gib() {
    for &(config, tp, batched, blocks) in CAPACITY {
        let spec = fixtures::spec(config);
        let pool = PoolOptions::new(tp, DType::BF16);
        let settings = EngineSettings {
            version: Version::new(0, 11, 0),
            max_num_seqs: Some(256),
            max_num_batched_tokens: Some(batched),
            ..EngineSettings::new(Engine::Vllm, (79.18 * GIB as f64) as u64, 4096, pool)
        };
        let budget = EngineBudget::new(&families::whole_layers(&spec), &spec, &settings, None);
        let block_bytes = Groups::new(&spec, pool).bytes_per_block;
        let off = (budget.printed.num_blocks as f64 - blocks as f64) * block_bytes as f64 / GIB as f64;
        let ratio = budget.printed.num_blocks as f64 / blocks as f64 - 1.0;
        println!(
            "{config} TP {tp}: {} blocks, logged {blocks}: {off:+.2} GiB, {:+.1} %",
            budget.printed.num_blocks,
            100.0 * ratio
        );
        assert!(off.abs() < budget.uncertainty_bytes as f64 / GIB as f64 && ratio.abs() < 0.03);
        // One boot log of the same machine leaves nothing to guess.
        let log = format!(
            "Model loading took {:.4} GiB and 3 seconds\nAvailable KV cache memory: {:.2} GiB\n",
            budget.terms[0].bytes as f64 / GIB as f64,
            (blocks * block_bytes) as f64 / GIB as f64
        );
        let log = parse_boot_log(log.as_bytes()).unwrap();
        let calibration = log.calibration(Some(settings.memory_total_bytes), Some(0.9));
        let calibrated = EngineBudget::new(&families::whole_layers(&spec), &spec, &settings, Some(&calibration));
        let off = calibrated.printed.num_blocks.abs_diff(blocks) * block_bytes;
        assert!(off <= calibrated.uncertainty_bytes, "{config}: {off} bytes off");
    }
}
