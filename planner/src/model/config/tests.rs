#![allow(clippy::unwrap_used)]

use super::*;
use crate::model::Quantization;
use crate::model::{Mask, Positions, RopeScaling, Task, families};

const VICUNA: &str = include_str!("../../../tests/fixtures/configs/lmsys__vicuna-13b-v1.5-16k.json");
const RERANKER: &str = include_str!("../../../tests/fixtures/configs/BAAI__bge-reranker-v2-m3.json");

fn parse(text: &str) -> Result<ModelSpec, ConfigError> {
    parse_config(text.as_bytes())
}

/// Vicuna's file with one field replaced (or removed, for `null`).
fn vicuna_with(field: &str, value: &str) -> Result<ModelSpec, ConfigError> {
    let mut map: serde_json::Map<String, serde_json::Value> = serde_json::from_str(VICUNA).unwrap();
    map.insert(field.to_owned(), serde_json::from_str(value).unwrap());
    parse(&serde_json::to_string(&map).unwrap())
}

#[test]
fn vicuna_is_read_whole() {
    let spec = parse(VICUNA).unwrap();
    assert_eq!(spec.architecture, "LlamaForCausalLM");
    assert_eq!(spec.layers.len(), 40);
    let attention = spec.layers[0].attention().unwrap();
    assert_eq!((attention.num_heads, attention.num_kv_heads, attention.head_dim), (40, 40, 128));
    assert_eq!(attention.mask, Mask::Causal);
    assert_eq!(attention.rope.as_ref().unwrap().scaling, RopeScaling::Linear { factor: 4.0 });
    assert_eq!(spec.max_position_embeddings, 16_384);
    assert_eq!((spec.dtype, spec.tied_embeddings, spec.task), (DType::F16, false, Task::Generate));
    assert_eq!(families::program(&spec).parameters(), 13_015_864_320);
}

#[test]
fn roberta_positions_start_after_padding() {
    let spec = parse(RERANKER).unwrap();
    assert_eq!(spec.positions, Positions::Learned { rows: 8194, offset: 2, token_types: 1 });
    assert_eq!(spec.max_position_embeddings, 8192);
    assert_eq!(spec.task, Task::Classify { labels: 1 });
}

#[test]
fn rope_parameters_of_transformers_5_are_read() {
    let old = vicuna_with("rope_theta", "500000.0").unwrap();
    let mut map: serde_json::Map<String, serde_json::Value> = serde_json::from_str(VICUNA).unwrap();
    map.remove("rope_scaling");
    map.remove("torch_dtype");
    map.insert("dtype".into(), "float16".into());
    map.insert("rope_parameters".into(), serde_json::json!({"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}));
    let new = parse(&serde_json::to_string(&map).unwrap()).unwrap();
    assert_eq!(old, new);
}

#[test]
fn bad_values_are_errors_that_name_field_and_range() {
    // Field, value, what the message must say.
    let table = [
        ("num_hidden_layers", "0", "`num_hidden_layers` is 0, expected a whole number from 1 to 1024"),
        ("num_hidden_layers", "1000000000", "from 1 to 1024"),
        ("num_hidden_layers", "\"40\"", "is a string, expected a whole number"),
        ("num_hidden_layers", "40.5", "`num_hidden_layers` is 40.5"),
        ("num_hidden_layers", "null", "`num_hidden_layers` is missing"),
        ("num_attention_heads", "0", "`num_attention_heads` is 0"),
        ("num_attention_heads", "-40", "`num_attention_heads` is -40"),
        ("num_attention_heads", "48", "`num_key_value_heads` is 40, expected a divisor of num_attention_heads, 48"),
        ("num_key_value_heads", "0", "`num_key_value_heads` is 0"),
        ("num_key_value_heads", "80", "a divisor of num_attention_heads, 40"),
        ("hidden_size", "1000000000", "`hidden_size` is 1000000000"),
        ("hidden_size", "5121", "40 (num_attention_heads) times a head size"),
        ("hidden_size", "[5120]", "is a list, expected a whole number"),
        ("head_dim", "0", "`head_dim` is 0"),
        ("head_dim", "127", "an even number"),
        ("head_dim", "1e300", "`head_dim` is 1e+300"),
        ("intermediate_size", "0", "`intermediate_size` is 0"),
        ("intermediate_size", "9007199254740993", "`intermediate_size` is 9007199254740993"),
        ("vocab_size", "0", "`vocab_size` is 0"),
        ("vocab_size", "99999999999999999999999", "`vocab_size` is"),
        ("max_position_embeddings", "1152921504606846976", "expected a whole number from 1 to 134217728"),
        ("max_position_embeddings", "null", "`max_position_embeddings` is missing"),
        ("rms_norm_eps", "0", "`rms_norm_eps` is 0"),
        ("rms_norm_eps", "-1e-5", "`rms_norm_eps` is -0.00001"),
        ("rope_theta", "0", "`rope_theta` is 0"),
        ("rope_theta", "true", "is a boolean, expected a number"),
        ("rope_scaling", r#"{"type":"linear","factor":-4}"#, "`rope_scaling.factor` is -4"),
        ("rope_scaling", r#"{"type":"linear","factor":0.5}"#, "`rope_scaling.factor` is 0.5"),
        ("rope_scaling", r#"{"type":"linear"}"#, "`rope_scaling.factor` is missing"),
        ("rope_scaling", r#"{"factor":4}"#, "`rope_scaling.rope_type` is missing"),
        ("rope_scaling", r#"{"type":"mrope","factor":4}"#, "`rope_scaling.type` is `mrope`, which is not supported"),
        ("rope_scaling", r#"{"type":"longrope","short_factor":[1],"long_factor":[1]}"#, "a list of 64 numbers"),
        ("rope_scaling", r#"{"rope_type":"llama3","factor":8,"low_freq_factor":4,"high_freq_factor":1}"#, "above"),
        ("rope_scaling", "[]", "is a list, expected an object"),
        ("partial_rotary_factor", "0.001", "an even number of rotated dimensions"),
        ("hidden_act", "\"gelu_quick\"", "`hidden_act` is `gelu_quick`, which is not supported"),
        ("hidden_act", "3", "is a number, expected a string"),
        ("torch_dtype", "\"int3\"", "`torch_dtype` is `int3`"),
        ("tie_word_embeddings", "\"no\"", "expected true or false"),
        ("architectures", "[]", "`architectures` is missing, expected a list with the model's class"),
        ("architectures", "\"LlamaForCausalLM\"", "is a string, expected a list"),
        ("architectures", "[1]", "`architectures[0]` is a number"),
        ("layer_types", "[\"full_attention\"]", "one entry for each of the 40 layers"),
        ("quantization_config", r#"{"quant_method":"hqq"}"#, "`hqq`, which is not supported"),
        ("quantization_config", r#"{"quant_method":"bitsandbytes"}"#, "`quantization_config.load_in_4bit` is false"),
        ("quantization_config", r#"{"quant_method":"awq","bits":5,"group_size":128}"#, "expected 2, 3, 4 or 8"),
        ("quantization_config", r#"{"quant_method":"awq","bits":4}"#, "`quantization_config.group_size` is missing"),
        ("quantization_config", r#"{"quant_method":"gptq","bits":4,"group_size":0}"#, "group_size` is 0"),
        ("quantization_config", r#"{"quant_algo":"FP2"}"#, "`FP2`, which is not supported"),
        ("quantization_config", r#"{"quant_method":"fp8","ignore":["re:(?!a)b"]}"#, "re:(?!a)b"),
        ("quantization_config", r#"{"quant_method":"fp8","ignore":[3]}"#, "a list of strings"),
        ("quantization_config", r#"{"quant_method":"fp8","weight_block_size":[0,128]}"#, "weight_block_size"),
        ("use_bidirectional_attention", "true", "not supported"),
    ];
    for (field, value, expected) in table {
        let error = vicuna_with(field, value).expect_err(&format!("{field} = {value} was accepted")).to_string();
        assert!(error.contains(expected), "{field} = {value}: {error}");
    }
}

#[test]
fn text_that_is_not_a_config_is_refused() {
    let table: [(&[u8], &str); 6] = [
        (b"", "not valid JSON at line 1"),
        (b"[]", "the file holds a list"),
        (b"42", "the file holds a number"),
        (b"{\"a\": 1", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"{\"architectures\": [\"\\u001b[2JGPT9\"]}", "unknown architecture `?[2JGPT9`; known: LlamaForCausalLM, "),
    ];
    for (bytes, expected) in table {
        let error = parse_config(bytes).unwrap_err().to_string();
        assert!(error.contains(expected), "{}: {error}", String::from_utf8_lossy(bytes));
    }
    for literal in ["NaN", "Infinity", "-Infinity"] {
        let text = VICUNA.replace("\"rms_norm_eps\": 1e-05", &format!("\"rms_norm_eps\": {literal}"));
        let error = parse(&text).unwrap_err().to_string();
        assert!(error.contains("`rms_norm_eps` is not a finite number, expected a number"), "{error}");
        // Where nothing reads it, it does no harm (Nemotron-H's time_step_limit).
        assert!(parse(&VICUNA.replacen('{', &format!("{{\"time_step_limit\": [0.0, {literal}],"), 1)).is_ok());
    }
    let long = vec![b' '; (4 << 20) + 1];
    assert!(matches!(parse_config(&long), Err(ConfigError::TooLarge { .. })));
    let deep = [b"{\"a\":".repeat(100_000), b"1".to_vec()].concat();
    assert!(matches!(parse_config(&deep), Err(ConfigError::Json { .. })));
}

#[test]
fn scaling_forms_give_the_context_length_that_vllm_derives() {
    let table = [
        ("null", 4096),
        (r#"{"rope_type":"default"}"#, 4096),
        (r#"{"type":"linear","factor":4.0}"#, 16_384),
        (r#"{"type":"dynamic","factor":2.0}"#, 8192),
        (r#"{"rope_type":"yarn","factor":32.0,"original_max_position_embeddings":2048}"#, 65_536),
        (r#"{"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0}"#, 4096),
    ];
    for (scaling, context) in table {
        let spec = vicuna_with("rope_scaling", scaling).unwrap();
        assert_eq!(spec.max_position_embeddings, context, "{scaling}");
    }
}

#[test]
fn yarn_takes_its_magnitude_from_the_factor() {
    let spec = vicuna_with("rope_scaling", r#"{"type":"yarn","factor":4.0}"#).unwrap();
    let scaling = &spec.layers[0].attention().unwrap().rope.as_ref().unwrap().scaling;
    let RopeScaling::Yarn { attention_factor, beta_fast, beta_slow, original_max_position, .. } = scaling else {
        panic!("{scaling:?}");
    };
    // 0.1 ln 4 + 1
    assert!((attention_factor - 1.138_629_436).abs() < 1e-9);
    assert_eq!((*beta_fast, *beta_slow, *original_max_position), (32.0, 1.0, 4096));
}

#[test]
fn windows_follow_the_family() {
    let kinds = |spec: &ModelSpec| {
        let short = |mask| match mask {
            Mask::Causal => 'f',
            Mask::Sliding { .. } => 's',
            Mask::Bidirectional => 'b',
            _ => '?',
        };
        spec.layers.iter().map(|l| short(l.attention().unwrap().mask)).collect::<String>()
    };
    let config = |architecture: &str, extra: &str| {
        let text = format!(
            r#"{{"architectures":["{architecture}"],"hidden_size":64,"num_hidden_layers":6,"num_attention_heads":4,
            "num_key_value_heads":2,"intermediate_size":64,"vocab_size":100,"max_position_embeddings":1024{extra}}}"#
        );
        parse(&text).map(|spec| kinds(&spec))
    };
    let ok = |kinds: &str| Ok(kinds.to_owned());
    assert_eq!(config("LlamaForCausalLM", r#","sliding_window":64"#), ok("ffffff"));
    assert_eq!(config("MistralForCausalLM", r#","sliding_window":64"#), ok("ssssss"));
    assert_eq!(config("MistralForCausalLM", r#","sliding_window":null"#), ok("ffffff"));
    // A window as long as the context is no window (Phi-3).
    assert_eq!(config("Phi3ForCausalLM", r#","sliding_window":2047"#), ok("ffffff"));
    assert_eq!(config("Qwen2ForCausalLM", r#","sliding_window":64,"max_window_layers":4"#), ok("ffffff"));
    let used = r#","use_sliding_window":true,"sliding_window":64,"max_window_layers":4"#;
    assert_eq!(config("Qwen2ForCausalLM", used), ok("ffffss"));
    assert_eq!(config("Gemma2ForCausalLM", r#","sliding_window":64"#), ok("sfsfsf"));
    assert_eq!(config("Gemma3ForCausalLM", r#","sliding_window":64"#), ok("sssssf"));
    assert_eq!(config("Gemma3ForCausalLM", r#","sliding_window":64,"sliding_window_pattern":3"#), ok("ssfssf"));
    let types = r#","sliding_window":64,"layer_types":["full_attention","sliding_attention","full_attention",
        "full_attention","full_attention","full_attention"]"#;
    assert_eq!(config("Gemma3ForCausalLM", types), ok("fsffff"));
    assert_eq!(config("LlamaForCausalLM", types), ok("fsffff"));
    let no_window = types.replace(r#""sliding_window":64,"#, "");
    assert!(
        config("LlamaForCausalLM", &no_window).is_err_and(|e| e.to_string().contains("`sliding_window` is missing"))
    );
    assert_eq!(config("Qwen2ForCausalLM", r#","is_causal":false"#), ok("bbbbbb"));
}

#[test]
fn gemma3_turns_sliding_layers_by_their_own_base() {
    let nested = r#"{"architectures":["Gemma3ForConditionalGeneration"],"torch_dtype":"bfloat16","text_config":{
        "hidden_size":2560,"intermediate_size":10240,"num_hidden_layers":34,"sliding_window":1024,
        "rope_scaling":{"factor":8.0,"rope_type":"linear"}},"vision_config":{"hidden_size":1152}}"#;
    let spec = parse(nested).unwrap();
    // Class defaults, which the file leaves out: 8 heads, 4 KV heads, 256 wide; the context is not stretched again.
    let attention = spec.layers[0].attention().unwrap();
    assert_eq!((attention.num_heads, attention.num_kv_heads, attention.head_dim), (8, 4, 256));
    assert_eq!((spec.vocab_size, spec.max_position_embeddings), (262_208, 131_072));
    assert!(spec.tied_embeddings && spec.norm.unit_offset);
    let rope = |layer: usize| spec.layers[layer].attention().unwrap().rope.clone().unwrap();
    assert_eq!((rope(0).theta, rope(0).scaling), (1e4, RopeScaling::None));
    assert_eq!((rope(5).theta, rope(5).scaling), (1e6, RopeScaling::Linear { factor: 8.0 }));
    // The language model of gemma-3-4b: 3.88 B.
    let parameters = families::program(&spec).parameters();
    assert!((parameters as f64 / 3.88e9 - 1.0).abs() < 0.01, "{parameters}");
    // transformers 5 keeps one object for each kind of layer.
    let new = nested.replace(
        r#""rope_scaling":{"factor":8.0,"rope_type":"linear"}"#,
        r#""rope_parameters":{"full_attention":{"rope_type":"linear","factor":8.0,"rope_theta":1000000.0},
           "sliding_attention":{"rope_type":"default","rope_theta":10000.0}}"#,
    );
    assert_eq!(parse(&new).unwrap(), spec);
}

#[test]
fn quantisation_is_told_in_every_spelling() {
    use crate::model::{Packed, Scales, Storage};
    let integers = |bits, scales, zeros| Packed::integers(bits, scales, zeros);
    let group = |columns| Scales::Group { columns };
    let block = Scales::Block { rows: 128, columns: 128 };
    // Value, form of linear weights, fp8 cache.
    let table = [
        (r#"{"quant_method":"awq","bits":4,"group_size":128}"#, integers(4, group(128), true), false),
        (r#"{"quant_method":"gptq","bits":8,"group_size":-1}"#, integers(8, Scales::Row, true), false),
        (r#"{"quant_method":"fp8","weight_block_size":[128,128]}"#, Packed::fp8(block), false),
        (r#"{"quant_algo":"FP8","kv_cache_scheme":"FP8"}"#, Packed::fp8(Scales::Tensor), true),
        (r#"{"quant_algo":"NVFP4","group_size":16}"#, Packed::NVFP4, false),
        (
            r#"{"quant_method":"compressed-tensors","kv_cache_scheme":{"num_bits":8,"type":"float"},
               "config_groups":{"group_0":{"weights":{"num_bits":8,"type":"float"}}},"ignore":["lm_head"]}"#,
            Packed::fp8(Scales::Tensor),
            true,
        ),
        (
            r#"{"quant_method":"compressed-tensors",
               "config_groups":{"group_0":{"weights":{"num_bits":4,"type":"int","group_size":128}}}}"#,
            integers(4, group(128), false),
            false,
        ),
        (
            r#"{"quant_method":"bitsandbytes","load_in_8bit":true}"#,
            Packed { element: crate::model::Element::Integer, bits: 8, scales: Scales::Row, scale_bits: 32 },
            false,
        ),
    ];
    for (value, linear, kv_cache_fp8) in table {
        let spec = vicuna_with("quantization_config", value).unwrap();
        let Quantization::Stored(stored) = &spec.quantization else { panic!("{value}") };
        assert_eq!((stored.linear, stored.kv_cache_fp8), (Storage::Packed(linear), kv_cache_fp8), "{value}");
    }
    assert_eq!(vicuna_with("quantization_config", "null").unwrap().quantization, Quantization::None);
    let file = br#"{"quantization":{"quant_algo":"FP8","kv_cache_quant_algo":"FP8","exclude_modules":["lm_head"]}}"#;
    let spec = parse(VICUNA).unwrap().with_hf_quant_config(file).unwrap();
    assert!(matches!(spec.quantization, Quantization::Stored(stored) if stored.kv_cache_fp8));
}

#[test]
fn modules_left_out_stay_plain() {
    use crate::model::Storage;
    let value = r#"{"quant_method":"fp8","modules_to_not_convert":["model.layers.3.mlp.down_proj"]}"#;
    let program = families::program(&vicuna_with("quantization_config", value).unwrap());
    let plain = |name: &str| program.weights.iter().find(|w| w.name == name).unwrap().storage == Storage::Plain;
    assert!(plain("model.layers.3.mlp.down_proj.weight") && plain("lm_head.weight"));
    assert!(plain("model.embed_tokens.weight") && plain("model.layers.0.input_layernorm.weight"));
    assert!(!plain("model.layers.2.mlp.down_proj.weight") && !plain("model.layers.3.mlp.up_proj.weight"));
}
