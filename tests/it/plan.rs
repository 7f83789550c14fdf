//! `mserve plan` as people run it: output, exit codes, errors.
#![allow(clippy::unwrap_used)]

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn config(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("planner/tests/fixtures/configs/{name}.json"))
}

fn vicuna() -> PathBuf {
    config("lmsys__vicuna-13b-v1.5-16k")
}

fn plan(model: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mserve")).arg("plan").arg(model).args(args).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

type Files<'a> = Vec<(&'a str, &'a [u8])>;

/// A directory with the given files.
fn directory(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        std::fs::write(directory.path().join(name), bytes).unwrap();
    }
    directory
}

/// A safetensors file of one tensor.
fn safetensors(shape: &str, data_bytes: usize) -> Vec<u8> {
    let header = format!(r#"{{"w":{{"dtype":"BF16","shape":{shape},"data_offsets":[0,{data_bytes}]}}}}"#);
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.into_bytes());
    file.extend(vec![0; data_bytes]);
    file
}

#[test]
fn vicuna_on_eight_named_cards() {
    let output = plan(&vicuna(), &["--gpus", "8", "--gpu", "h100"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let text = stdout(&output);
    assert!(text.contains("0.78125 MiB per token at TP 1 in F16"));
    assert!(!text.contains('\u{1b}'), "no escapes into a pipe");
    insta::assert_snapshot!("plan_vicuna_h100x8", text);
}

#[test]
fn sliding_layers_and_replicated_heads_are_told() {
    let output = plan(&config("google__gemma-3-1b-it"), &["--gpus", "5", "--gpu", "l4", "--max-model-len", "16k"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    insta::assert_snapshot!("plan_gemma3_l4x5", stdout(&output));
}

#[test]
fn encoders_have_no_cache_to_plan() {
    let output = plan(&config("BAAI__bge-reranker-v2-m3"), &["--gpu", "l4"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    insta::assert_snapshot!("plan_reranker_l4", stdout(&output));
}

#[test]
fn json_is_one_versioned_object() {
    let output = plan(&vicuna(), &["--gpus", "8", "--gpu", "h100", "--json"]);
    let json: Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(json["schema"], 2);
    assert_eq!(json["card_source"], "flag");
    assert_eq!(json["model"]["kv_bytes_per_token"], 819_200);
    assert_eq!(json["options"].as_array().unwrap().len(), 4);
    assert_eq!(json["options"][0]["full"]["tokens"], 16_384);
}

#[test]
fn flags_have_the_names_that_peers_use() {
    let plain = plan(&vicuna(), &["--gpu", "h200", "--gpus", "2", "--tensor-parallel-size", "2"]);
    let directory = directory(&[("config.json", &std::fs::read(vicuna()).unwrap())]);
    let model = directory.path().to_str().unwrap();
    let aliases = Command::new(env!("CARGO_BIN_EXE_mserve"))
        .args(["plan", "--model", model, "--gpu", "NVIDIA H200", "--gpus", "2", "--tp", "2"])
        .args(["--vram-ratio", "0.9", "--context-length", "16k", "--kv-cache-dtype", "fp16"])
        .output()
        .unwrap();
    assert_eq!(aliases.status.code(), Some(0), "{}", stderr(&aliases));
    // All but the model's name.
    let rest =
        |output: &Output| stdout(output).lines().filter(|l| !l.starts_with("model")).collect::<Vec<_>>().join("\n");
    assert_eq!(rest(&plain), rest(&aliases));
}

#[test]
fn an_unknown_architecture_is_no_guess() {
    let directory = directory(&[("config.json", br#"{"architectures":["RwkvForCausalLM"]}"#)]);
    let output = plan(directory.path(), &["--gpu", "h100"]);
    assert_eq!(output.status.code(), Some(2));
    let text = stderr(&output);
    assert!(text.contains("config.json: unknown architecture `RwkvForCausalLM`; known: R"), "{text}");
    assert_eq!(stdout(&output), "");
}

#[test]
fn what_does_not_fit_ends_with_3_and_says_what_would() {
    let model = config("meta-llama__Meta-Llama-3.1-70B");
    let output = plan(&model, &["--gpus", "8", "--gpu", "rtx4090"]);
    assert_eq!(output.status.code(), Some(3));
    let text = stderr(&output);
    assert!(text.contains("does not fit 8 x NVIDIA GeForce RTX 4090"), "{text}");
    assert!(text.contains("--kv-cache-dtype fp8") && text.contains("--gpu rtx5090"), "{text}");
    // The change it names does it.
    let output = plan(&model, &["--gpus", "8", "--gpu", "rtx4090", "--kv-cache-dtype", "fp8"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let output = plan(&model, &["--gpus", "1", "--gpu", "rtx4090", "--json"]);
    assert_eq!(output.status.code(), Some(3));
    let json: Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert!(json["does_not_fit"]["needed_bytes"].as_u64() > json["does_not_fit"]["requested_bytes"].as_u64());
}

#[test]
fn targets_without_gpus_say_how_many() {
    let model = config("meta-llama__Meta-Llama-3.1-8B");
    let shape = ["--gpu", "l40s", "--max-model-len", "8k", "--isl", "1024", "--osl", "256"];
    let output = plan(&model, &[&shape[..], &["--target-request-rate", "30", "--tpot", "80", "--json"]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let json: Value = serde_json::from_str(&stdout(&output)).unwrap();
    let gpus = json["gpus"].as_u64().unwrap();
    let best = &json["options"][0]["speed"];
    assert!(gpus > 1 && best["gpus_needed"].as_u64().unwrap() <= gpus, "{best}");
    assert!(best["requests_per_s"].as_f64().unwrap() >= 29.99 && best["replica"]["tpot_ms"].as_f64().unwrap() <= 80.0);
    let fewer = (gpus - 1).to_string();
    let output =
        plan(&model, &[&shape[..], &["--target-request-rate", "30", "--tpot", "80", "--gpus", &fewer]].concat());
    assert_eq!(output.status.code(), Some(3));
    assert!(stderr(&output).contains("no option meets the targets"), "{}", stderr(&output));
}

#[test]
fn a_split_is_ranked_and_says_why_the_others_lost() {
    let (llm, embed, rerank) = (vicuna(), config("BAAI__bge-large-en-v1.5"), config("BAAI__bge-reranker-v2-m3"));
    let small = ["--slm", embed.to_str().unwrap(), "--slm", rerank.to_str().unwrap()];
    let cards = ["--gpu", "a100-40g", "--gpus", "8", "--max-model-len", "2k", "--target-request-rate", "100"];
    let output = plan(&llm, &[&cards[..], &small[..], &["--workload", "doc-qa"]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let text = stdout(&output);
    assert!(text.contains("the small models want: doc-qa* 2-4, kb-qa 4-8, balanced 2\n"), "{text}");
    insta::assert_snapshot!("plan_split_a100x8", text);
    let output = plan(&llm, &[&cards[..], &["--slm", llm.to_str().unwrap()]].concat());
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("generates text"), "{}", stderr(&output));
    let output = plan(&llm, &["--gpu", "a100-40g", "--workload", "doc-qa"]);
    assert_eq!(output.status.code(), Some(2), "a workload without small models");
}

#[test]
fn explain_gives_every_figure_its_formula() {
    let output = plan(&vicuna(), &["--gpus", "8", "--gpu", "a100-40g", "--max-model-len", "2k", "--explain"]);
    let text = stdout(&output);
    let explained = text.split("How the best option comes about:\n").nth(1).unwrap();
    insta::assert_snapshot!("plan_explained", explained);
}

#[test]
fn bad_arguments_end_with_2() {
    let table: [(&[&str], &str); 13] = [
        (&["--gpu", "h300"], "unknown GPU `h300`; known: t4"),
        (&["--gpu", "h100", "--gpus", "0"], "--gpus"),
        (&["--gpu", "h100", "--vram-ratio", "1.5"], "gpu_memory_utilization is 1.5"),
        (&["--gpu", "h100", "--vram-ratio", "nan"], "gpu_memory_utilization is NaN"),
        (&["--gpu", "h100", "--max-model-len", "many"], "not a number of tokens"),
        (&["--gpu", "h100", "--max-model-len", "32k"], "expected 1 to 16384"),
        (&["--gpu", "h100", "--kv-cache-dtype", "fp4"], "expected auto, fp16, bf16 or fp8"),
        (&["--gpu", "h100", "--gpus", "8", "--tp", "3"], "possible: 1, 2, 4, 8"),
        (&["--gpu", "h100", "--max-num-seqs", "0"], "max_num_seqs is 0"),
        (&["--gpu", "h100", "--engine", "tgi"], "expected mserve, vllm or sglang"),
        (&["--gpu", "h100", "--tpot=-1"], "tpot is -1"),
        (&["--gpu", "h100", "--ttft", "nan"], "ttft is NaN"),
        (&["--gpu", "h100", "--target-request-rate", "inf"], "target_request_rate is inf"),
    ];
    for (args, expected) in table {
        let output = plan(&vicuna(), args);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(expected), "{args:?}: {}", stderr(&output));
        assert_eq!(stdout(&output), "");
    }
}

#[test]
fn bad_files_end_with_2() {
    let config = std::fs::read(vicuna()).unwrap();
    let lying = safetensors("[99]", 8);
    let table: [(Files<'_>, &str); 6] = [
        (vec![], "no config.json in this directory"),
        (vec![("config.json", b"{")], "config.json: not valid JSON"),
        (vec![("config.json", &config), ("model.safetensors", b"short")], "too few for a safetensors file"),
        (vec![("config.json", &config), ("model.safetensors", &[255; 64])], "model.safetensors: the header claims"),
        (vec![("config.json", &config), ("model.safetensors", &lying)], "tensor w"),
        (
            vec![
                ("config.json", &config),
                ("model.safetensors.index.json", br#"{"weight_map":{"w":"../x.safetensors"}}"#),
            ],
            "../x.safetensors",
        ),
    ];
    for (files, expected) in table {
        let directory = directory(&files);
        let output = plan(directory.path(), &["--gpu", "h100"]);
        assert_eq!(output.status.code(), Some(2), "{expected}: {}", stderr(&output));
        assert!(stderr(&output).contains(expected), "{}", stderr(&output));
    }
    let output = plan(Path::new("/nowhere/at/all"), &["--gpu", "h100"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("no such file or directory"));
}

#[test]
fn weights_come_from_the_headers_where_files_are() {
    let config = std::fs::read(vicuna()).unwrap();
    let checkpoint = safetensors("[1000000]", 2_000_000);
    let directory = directory(&[("config.json", &config), ("model.safetensors", &checkpoint)]);
    let output = plan(directory.path(), &["--gpu", "h100", "--json"]);
    let json: Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(json["model"]["weights_bytes"], 2_000_000);
    assert_eq!(json["model"]["weights_source"], "checkpoint");
    assert!(json["notes"].to_string().contains("The checkpoint holds 1.91 MiB"), "{}", json["notes"]);
}

#[test]
fn the_demo_model_is_planned_from_its_own_files() {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/demo-model");
    let output = plan(&demo, &["--gpu", "t4", "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let json: Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(json["model"]["name"], "demo-model");
    // The file less its header.
    let file_bytes = std::fs::metadata(demo.join("model.safetensors")).unwrap().len();
    let weights = json["model"]["weights_bytes"].as_u64().unwrap();
    assert!(file_bytes - weights < 20_000, "{weights} of {file_bytes}");
    assert_eq!(weights, 2 * json["model"]["parameters"].as_u64().unwrap());
}

#[test]
fn without_a_gpu_flag_there_is_always_an_answer() {
    // Whatever this machine has: cards of its own, or the default one with a row for each common card.
    let output = plan(&config("Qwen__Qwen3-0.6B"), &["--gpus", "8"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let text = stdout(&output);
    let first = text.lines().next().unwrap();
    if first.starts_with("No NVIDIA driver here: planned for 8 x NVIDIA H100 80GB HBM3") {
        for card in ["NVIDIA L4", "NVIDIA A100-SXM4-40GB", "NVIDIA H200"] {
            assert!(text.lines().any(|line| line.starts_with(card)), "{text}");
        }
    } else {
        assert!(first.contains("of this machine"), "{first}");
    }
}

#[test]
fn the_file_that_is_written_is_what_launch_reads() {
    use mserve::settings::{Flags, resolve};
    let file = |name: &str| std::fs::read(config(name)).unwrap();
    let home = tempfile::tempdir().unwrap();
    let model = |name: &str, config: &str| {
        let directory = home.path().join(name);
        std::fs::create_dir(&directory).unwrap();
        std::fs::write(directory.join("config.json"), file(config)).unwrap();
        directory
    };
    let llm = model("llama", "meta-llama__Meta-Llama-3.1-8B");
    let embed = model("bge large", "BAAI__bge-large-en-v1.5");
    let written = home.path().join("mserve.toml");
    let to = ["--write", written.to_str().unwrap()];
    let cards = ["--gpu", "h100", "--gpus", "4", "--max-model-len", "16k", "--vram-ratio", "0.8"];
    let output = plan(&llm, &[&cards[..], &to[..]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let flags = || Flags { config: Some(written.clone()), ..Flags::default() };
    let settings = resolve(flags(), home.path()).unwrap();
    let one = &settings.models[0];
    assert_eq!((settings.models.len(), &one.name[..], one.replicas), (1, "llama", 4));
    assert_eq!(
        (one.max_model_len, one.max_num_seqs, one.max_num_batched_tokens),
        (Some(16_384), Some(256), Some(8448))
    );
    assert_eq!(one.gpu_memory_utilization.map(|share| share.ratio()), Some(0.8));
    assert_eq!(one.path.canonicalize().unwrap(), llm.canonicalize().unwrap());

    let slm = ["--slm", embed.to_str().unwrap(), "--slm-ratio", "60"];
    let cards = ["--gpu", "h100", "--gpus", "4", "--max-model-len", "8k"];
    let output = plan(&llm.join("config.json"), &[&cards[..], &slm[..], &to[..]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let settings = resolve(flags(), home.path()).unwrap();
    let replicas: u32 = settings.models.iter().map(|model| model.replicas).sum();
    assert_eq!((settings.models.len(), replicas, &settings.models[1].name[..]), (2, 4, "bge-large"));
    // The runtime has no kernels for it on a card: the file says so and leaves the device to `launch`.
    assert_eq!(format!("{:?}", settings.models[1].devices), "Auto");
    assert!(stderr(&output).contains("serves it on the CPU: the CUDA runtime cannot run"), "{}", stderr(&output));

    // What launch cannot run is not written.
    std::fs::remove_file(&written).unwrap();
    let large = config("meta-llama__Meta-Llama-3.1-70B");
    let output = plan(&large, &[&["--gpu", "h100", "--gpus", "4", "--max-model-len", "8k"], &to[..]].concat());
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    assert!(!written.exists() && stderr(&output).contains("on one card"), "{}", stderr(&output));
    let reranker = config("BAAI__bge-reranker-v2-m3");
    let slm = ["--slm", reranker.to_str().unwrap(), "--slm-ratio", "60"];
    for (flags, code, why) in [
        (&slm[..], 3, "does not serve it: classifiers and rerankers"),
        (&["--engine", "vllm"], 2, "for mserve's own runtime, and this plan is for vllm"),
        (&["--kv-cache-dtype", "fp8"], 2, "keeps the cache in the model's own type"),
    ] {
        let output = plan(&llm, &[&["--gpu", "h100", "--gpus", "4", "--max-model-len", "8k"], flags, &to].concat());
        assert_eq!(output.status.code(), Some(code), "{}", stderr(&output));
        assert!(!written.exists() && stderr(&output).contains(why), "{}", stderr(&output));
    }
}

#[test]
fn other_engines_print_their_own_lines_and_a_boot_log_calibrates_them() {
    let model = config("meta-llama__Meta-Llama-3.1-8B");
    let vllm = ["--gpu", "h200", "--vram-ratio", "0.9", "--max-model-len", "8k", "--engine", "vllm"];
    let output = plan(&model, &[&vllm[..], &["--engine-version", "0.26"]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let text = stdout(&output);
    assert!(text.contains("Available KV cache memory: 10") && text.contains("as vLLM 0.26.0 prints it"), "{text}");
    assert!(text.contains("max_num_seqs 1024"), "its default on such a card: {text}");

    let home = directory(&[(
        "boot.log",
        b"INFO Initializing a V1 LLM engine (v0.26.0) with config: gpu_memory_utilization=0.9\n\
          INFO Model loading took 15.10 GiB and 4.5 seconds\nINFO Available KV cache memory: 100.00 GiB\n",
    )]);
    let log = home.path().join("boot.log");
    let output = plan(&model, &["--gpu", "h200", "--max-model-len", "8k", "--from-log", log.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let text = stdout(&output);
    assert!(text.contains("Available KV cache memory: 100.00 GiB"), "{text}");
    assert!(text.contains("calibrated") && text.contains("15.10 GiB"), "{text}");

    let other = home.path().join("other.log");
    std::fs::write(&other, "nothing of the kind").unwrap();
    for (args, why) in [
        (vec!["--from-log", other.to_str().unwrap()], "no line of the log tells about memory"),
        (vec!["--from-log", "/nonexistent"], "No such file"),
        (vec!["--engine-version", "latest", "--engine", "vllm"], "is not a version"),
        (vec!["--engine-version", "0.11.0"], "are of another engine"),
    ] {
        let output = plan(&model, &[&["--gpu", "h200"], &args[..]].concat());
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(stderr(&output).contains(why), "{args:?}: {}", stderr(&output));
    }
}
