//! Every config of the families that can be planned: KV bytes per token and parameters, against figures worked out
//! by hand (2 x layers x KV heads x head size x bytes) and against what was published.
#![allow(clippy::unwrap_used)]

use crate::fixtures::{self, spec};
use mserve_planner::memory::{KvCacheDtype, KvGroupKind, KvLayout, SlidingLayers, rank_weight_bytes};
use mserve_planner::model::{DType, Family, ModelSpec, Task, families};

struct Row {
    config: &'static str,
    /// Published, and where.
    parameters: u64,
    source: &'static str,
    /// Served without a cache. For decoders the KV columns then say what generating with the same weights would take.
    one_shot: bool,
    /// Layers and bytes per token of full attention at TP 1.
    full: (u64, u64),
    /// Window, layers and bytes per token of sliding layers at TP 1.
    sliding: Option<(u64, u64, u64)>,
    /// A TP size, with more ranks than KV heads where that is legal, and all bytes per token on one rank of it.
    tensor_parallel: (u64, u64),
}

#[rustfmt::skip]
const GOLDEN: &[Row] = &[
    Row {
        config: "Alibaba-NLP__gte-Qwen2-7B-instruct",
        parameters: 7_612_756_480, source: "Hub parameter count, 7.61 B",
        one_shot: true, full: (28, 57344), sliding: None, tensor_parallel: (2, 28672),
    },
    Row {
        config: "BAAI__bge-large-en-v1.5",
        parameters: 335_141_888, source: "Hub parameter count (with the pooler, which embedding does not use)",
        one_shot: true, full: (0, 0), sliding: None, tensor_parallel: (2, 0),
    },
    Row {
        config: "BAAI__bge-large-zh-v1.5",
        parameters: 325_522_432, source: "Hub parameter count (with the pooler)",
        one_shot: true, full: (0, 0), sliding: None, tensor_parallel: (2, 0),
    },
    Row {
        config: "BAAI__bge-reranker-v2-m3",
        parameters: 567_755_777, source: "Hub parameter count",
        one_shot: true, full: (0, 0), sliding: None, tensor_parallel: (2, 0),
    },
    Row {
        config: "HuggingFaceTB__SmolLM-1.7B",
        parameters: 1_711_376_384, source: "Hub parameter count",
        one_shot: false, full: (24, 196608), sliding: None, tensor_parallel: (2, 98304),
    },
    Row {
        config: "Qwen__Qwen2-7B",
        parameters: 7_615_616_512, source: "model.safetensors.index.json: total_size 15,231,233,024",
        one_shot: false, full: (28, 57344), sliding: None, tensor_parallel: (2, 28672),
    },
    Row {
        config: "Qwen__Qwen2.5-1.5B",
        parameters: 1_543_714_304, source: "Hub parameter count",
        one_shot: false, full: (28, 28672), sliding: None, tensor_parallel: (4, 14336),
    },
    Row {
        config: "Qwen__Qwen2.5-14B-Instruct-AWQ",
        parameters: 14_770_033_664, source: "Hub parameter count of Qwen2.5-14B; the card says 14.7 B",
        one_shot: false, full: (48, 196608), sliding: None, tensor_parallel: (2, 98304),
    },
    Row {
        config: "Qwen__Qwen2.5-32B",
        parameters: 32_763_876_352, source: "model.safetensors.index.json: total_size 65,527,752,704",
        one_shot: false, full: (64, 262144), sliding: None, tensor_parallel: (2, 131072),
    },
    Row {
        config: "Qwen__Qwen2.5-72B",
        parameters: 72_700_000_000, source: "model card: 72.7 B",
        one_shot: false, full: (80, 327680), sliding: None, tensor_parallel: (16, 40960),
    },
    Row {
        config: "Qwen__Qwen2.5-7B-Instruct",
        parameters: 7_615_616_512, source: "model.safetensors.index.json: total_size 15,231,233,024",
        one_shot: false, full: (28, 57344), sliding: None, tensor_parallel: (2, 28672),
    },
    Row {
        config: "Qwen__Qwen3-0.6B",
        parameters: 596_049_920, source: "model card: 0.6 B, 0.44 B of it outside the embedding of 151,936 x 1,024",
        one_shot: false, full: (28, 114688), sliding: None, tensor_parallel: (16, 14336),
    },
    Row {
        config: "Qwen__Qwen3-1.7B",
        parameters: 1_720_574_976, source: "model card: 1.7 B, 1.4 B of it outside the embedding of 151,936 x 2,048",
        one_shot: false, full: (28, 114688), sliding: None, tensor_parallel: (16, 14336),
    },
    Row {
        config: "Qwen__Qwen3-32B-FP8-Static-PerTensor",
        parameters: 32_762_123_264, source: "as Qwen3-32B",
        one_shot: false, full: (64, 131072), sliding: None, tensor_parallel: (16, 16384),
    },
    Row {
        config: "Qwen__Qwen3-32B",
        parameters: 32_762_123_264, source: "model.safetensors.index.json: total_size 65,524,246,528",
        one_shot: false, full: (64, 262144), sliding: None, tensor_parallel: (16, 32768),
    },
    Row {
        config: "Qwen__Qwen3-4B",
        parameters: 4_022_468_096, source: "model.safetensors.index.json: total_size 8,044,936,192",
        one_shot: false, full: (36, 147456), sliding: None, tensor_parallel: (16, 18432),
    },
    Row {
        config: "Qwen__Qwen3-8B",
        parameters: 8_190_735_360, source: "model.safetensors.index.json: total_size 16,381,470,720",
        one_shot: false, full: (36, 147456), sliding: None, tensor_parallel: (16, 18432),
    },
    Row {
        config: "Qwen__Qwen3-Reranker-0.6B",
        parameters: 596_000_000, source: "Hub parameter count, 596 M",
        one_shot: false, full: (28, 114688), sliding: None, tensor_parallel: (16, 14336),
    },
    Row {
        config: "Skywork__Skywork-Reward-Llama-3.1-8B-v0.2",
        parameters: 7_504_928_768, source: "Llama-3.1-8B less lm_head (128,256 x 4,096), plus one score row",
        one_shot: true, full: (32, 131072), sliding: None, tensor_parallel: (16, 16384),
    },
    Row {
        config: "cross-encoder__ms-marco-MiniLM-L-6-v2",
        parameters: 22_700_000, source: "Hub parameter count, 22.7 M",
        one_shot: true, full: (0, 0), sliding: None, tensor_parallel: (2, 0),
    },
    Row {
        config: "deepseek-ai__DeepSeek-R1-Distill-Llama-8B",
        parameters: 8_030_261_248, source: "as Llama-3.1-8B",
        one_shot: false, full: (32, 131072), sliding: None, tensor_parallel: (16, 16384),
    },
    Row {
        config: "google__gemma-2-2b",
        parameters: 2_614_341_888, source: "Hub parameter count, 2.61 B",
        one_shot: false, full: (13, 53248), sliding: Some((4096, 13, 53248)), tensor_parallel: (8, 26624),
    },
    Row {
        config: "google__gemma-3-1b-it",
        parameters: 999_885_952, source: "Hub parameter count",
        one_shot: false, full: (4, 4096), sliding: Some((512, 22, 22528)), tensor_parallel: (2, 26624),
    },
    Row {
        config: "intfloat__e5-mistral-7b-instruct",
        parameters: 7_110_660_096, source: "Hub parameter count, 7.11 B (no lm_head)",
        one_shot: true, full: (0, 0), sliding: Some((4096, 32, 131072)), tensor_parallel: (16, 16384),
    },
    Row {
        config: "lmsys__vicuna-13b-v1.5-16k",
        parameters: 13_015_864_320, source: "Llama-2-13B: 13.0 B",
        one_shot: false, full: (40, 819200), sliding: None, tensor_parallel: (2, 409600),
    },
    Row {
        config: "meta-llama__Llama-2-70b-hf",
        parameters: 68_976_648_192, source: "model.safetensors.index.json: total_size 137,953,316,864, rotary tables left off",
        one_shot: false, full: (80, 327680), sliding: None, tensor_parallel: (16, 40960),
    },
    Row {
        config: "meta-llama__Llama-2-7b-hf",
        parameters: 6_738_415_616, source: "Hub parameter count, 6.74 B",
        one_shot: false, full: (32, 524288), sliding: None, tensor_parallel: (2, 262144),
    },
    Row {
        config: "meta-llama__Llama-3.1-8B-Instruct",
        parameters: 8_030_261_248, source: "model.safetensors.index.json: total_size 16,060,522,496",
        one_shot: false, full: (32, 131072), sliding: None, tensor_parallel: (16, 16384),
    },
    Row {
        config: "meta-llama__Llama-3.2-1B-Instruct",
        parameters: 1_235_814_400, source: "model card: 1.23 B; Hub parameter count",
        one_shot: false, full: (16, 32768), sliding: None, tensor_parallel: (16, 4096),
    },
    Row {
        config: "meta-llama__Meta-Llama-3-70B-Instruct",
        parameters: 70_553_706_496, source: "model.safetensors.index.json: total_size 141,107,412,992",
        one_shot: false, full: (80, 327680), sliding: None, tensor_parallel: (16, 40960),
    },
    Row {
        config: "meta-llama__Meta-Llama-3-8B-Instruct",
        parameters: 8_030_261_248, source: "model.safetensors.index.json: total_size 16,060,522,496",
        one_shot: false, full: (32, 131072), sliding: None, tensor_parallel: (16, 16384),
    },
    Row {
        config: "meta-llama__Meta-Llama-3.1-70B",
        parameters: 70_553_706_496, source: "model.safetensors.index.json: total_size 141,107,412,992",
        one_shot: false, full: (80, 327680), sliding: None, tensor_parallel: (16, 40960),
    },
    Row {
        config: "meta-llama__Meta-Llama-3.1-8B",
        parameters: 8_030_261_248, source: "model.safetensors.index.json: total_size 16,060,522,496",
        one_shot: false, full: (32, 131072), sliding: None, tensor_parallel: (16, 16384),
    },
    Row {
        config: "microsoft__Phi-3-mini-128k-instruct",
        parameters: 3_821_079_552, source: "model card: 3.8 B; Hub parameter count, 3.82 B",
        one_shot: false, full: (32, 393216), sliding: None, tensor_parallel: (2, 196608),
    },
    Row {
        config: "mistralai__Mistral-7B-v0.1",
        parameters: 7_241_732_096, source: "model.safetensors.index.json: total_size 14,483,464,192",
        one_shot: false, full: (0, 0), sliding: Some((4096, 32, 131072)), tensor_parallel: (16, 16384),
    },
    Row {
        config: "mistralai__Mistral-Nemo-Instruct-2407",
        parameters: 12_247_782_400, source: "Hub parameter count, 12.2 B",
        one_shot: false, full: (40, 163840), sliding: None, tensor_parallel: (16, 20480),
    },
    Row {
        config: "nvidia__Llama-3.1-70B-Instruct-FP8",
        parameters: 70_553_706_496, source: "as Llama-3.1-70B",
        one_shot: false, full: (80, 163840), sliding: None, tensor_parallel: (16, 20480),
    },
    Row {
        config: "sentence-transformers__all-MiniLM-L6-v2",
        parameters: 22_713_216, source: "Hub parameter count (with the pooler)",
        one_shot: true, full: (0, 0), sliding: None, tensor_parallel: (2, 0),
    },
];

fn layout(spec: &ModelSpec, tp: u64) -> KvLayout {
    let dtype = KvCacheDtype::Auto.resolve(spec);
    KvLayout::new(&families::program(spec), tp, dtype, 16, SlidingLayers::KeepWindow)
}

#[test]
fn kv_bytes_per_token_are_the_golden_ones() {
    for row in GOLDEN {
        let spec = spec(row.config);
        assert_eq!(layout(&spec, 1).is_empty(), row.one_shot, "{}", row.config);
        let encoder = matches!(spec.family, Family::Bert | Family::XlmRoberta);
        let spec = if encoder { spec } else { spec.with_task(Task::Generate) };
        let one = layout(&spec, 1);
        let of_kind = |sliding: bool| {
            let matches = |kind| matches!(kind, KvGroupKind::Sliding { .. }) == sliding;
            one.groups.iter().find(|g| matches(g.kind)).map(|g| (g.kind, g.layers, g.bytes_per_token()))
        };
        let full = of_kind(false).map_or((0, 0), |(_, layers, bytes)| (layers, bytes));
        assert_eq!(full, row.full, "{}", row.config);
        let sliding = of_kind(true).map(|(kind, layers, bytes)| match kind {
            KvGroupKind::Sliding { window_tokens } => (window_tokens, layers, bytes),
            KvGroupKind::Full => unreachable!("selected by kind"),
        });
        assert_eq!(sliding, row.sliding, "{}", row.config);
        let (tp, bytes) = row.tensor_parallel;
        assert_eq!(layout(&spec, tp).bytes_per_token(), bytes, "{} at TP {tp}", row.config);
    }
}

#[test]
fn parameters_are_within_one_percent_of_the_published_count() {
    for row in GOLDEN {
        let spec = spec(row.config);
        // A causal checkpoint that is served as an embedding model still holds its head.
        let spec = if spec.architecture.ends_with("ForCausalLM") { spec.with_task(Task::Generate) } else { spec };
        let ours = families::program(&spec).parameters();
        let error = ours as f64 / row.parameters as f64 - 1.0;
        assert!(error.abs() < 0.01, "{}: {ours} against {} ({})", row.config, row.parameters, row.source);
    }
}

#[test]
fn every_fixture_has_a_golden_row() {
    let mut configs: Vec<_> = GOLDEN.iter().map(|row| row.config.to_owned()).collect();
    configs.sort();
    assert_eq!(fixtures::names(), configs);
}

#[test]
fn vicuna_takes_0_78125_mib_a_token() {
    let bytes = layout(&spec("lmsys__vicuna-13b-v1.5-16k"), 1).bytes_per_token();
    assert_eq!(bytes as f64 / (1 << 20) as f64, 0.78125);
}

#[test]
fn ranks_together_hold_at_least_the_model() {
    for row in GOLDEN {
        let spec = spec(row.config);
        let program = families::program(&spec);
        let whole = rank_weight_bytes(&program, &spec, 1);
        for tp in [2, 4, 8, 16] {
            let sum = tp * rank_weight_bytes(&program, &spec, tp);
            assert!(sum >= whole, "{} at TP {tp}: {sum} < {whole}", row.config);
        }
    }
}

#[test]
fn quantised_checkpoints_take_their_packed_size() {
    // Qwen2.5-14B-Instruct-AWQ: three files of 3.96, 3.99 and 2.04 GB on the Hub.
    let awq = spec("Qwen__Qwen2.5-14B-Instruct-AWQ");
    let bytes = rank_weight_bytes(&families::program(&awq), &awq, 1);
    assert!((bytes as f64 / 9.98e9 - 1.0).abs() < 0.01, "{bytes}");
    // FP8: a byte for every projection, two for embedding and head.
    let fp8 = spec("Qwen__Qwen3-32B-FP8-Static-PerTensor");
    let bytes = rank_weight_bytes(&families::program(&fp8), &fp8, 1);
    let (embedding, all) = (2 * 151_936 * 5120, 32_762_123_264_u64);
    let expected = 2 * embedding + (all - embedding);
    assert!((bytes as f64 / expected as f64 - 1.0).abs() < 0.01, "{bytes} against {expected}");
}

#[test]
fn float32_checkpoints_are_planned_in_two_bytes() {
    let spec = spec("google__gemma-2-2b");
    assert_eq!(spec.dtype, DType::F32);
    assert_eq!(rank_weight_bytes(&families::program(&spec), &spec, 1), 2 * 2_614_341_888);
    assert_eq!(KvCacheDtype::Auto.resolve(&spec), DType::BF16);
}
