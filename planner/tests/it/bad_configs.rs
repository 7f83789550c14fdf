//! What does not fit is refused by name, in every file of the corpus; nothing is guessed in its place.
#![allow(clippy::unwrap_used)]

use crate::fixtures;
use mserve_planner::model::parse_config;
use serde_json::{Map, Value, json};

/// Fields that sizes come from, under the names of all families.
const SIZES: &[&str] = &[
    "hidden_size",
    "n_embd",
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "num_attention_heads",
    "n_head",
    "num_key_value_heads",
    "multi_query_group_num",
    "head_dim",
    "kv_channels",
    "v_head_dim",
    "vocab_size",
    "padded_vocab_size",
    "intermediate_size",
    "ffn_hidden_size",
    "moe_intermediate_size",
    "dense_intermediate_size",
    "intermediate_size_mlp",
    "ff_intermediate_size",
    "max_position_embeddings",
    "seq_length",
    "n_positions",
    "kv_lora_rank",
    "q_lora_rank",
    "o_lora_rank",
    "o_groups",
    "qk_rope_head_dim",
    "qk_nope_head_dim",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "n_routed_experts",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "sliding_window",
    "attention_chunk_size",
    "global_head_dim",
    "num_global_key_value_heads",
    "swa_num_key_value_heads",
    "swa_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
    "mamba_num_heads",
    "mamba_head_dim",
    "ssm_state_size",
    "n_groups",
    "conv_kernel",
    "full_attention_interval",
    "hc_mult",
    "moe_latent_size",
    "routed_expert_hidden_size",
    "first_k_dense_replace",
    "global_attn_every_n_layers",
];

fn fields(name: &str) -> Map<String, Value> {
    let text = String::from_utf8(fixtures::json(name)).unwrap().replace("Infinity", "1e9");
    serde_json::from_str(&text).unwrap()
}

/// The object that describes the language model.
fn text(map: &mut Map<String, Value>) -> &mut Map<String, Value> {
    match map.contains_key("text_config") {
        true => map.get_mut("text_config").unwrap().as_object_mut().unwrap(),
        false => map,
    }
}

fn with(name: &str, field: &str, value: &Value) -> Vec<u8> {
    let mut map = fields(name);
    text(&mut map).insert(field.to_owned(), value.clone());
    serde_json::to_vec(&map).unwrap()
}

#[test]
fn sizes_that_cannot_be_are_refused_by_name() {
    let mut refused = 0;
    for name in fixtures::names() {
        let mut map = fields(&name);
        let present: Vec<_> = SIZES.iter().filter(|f| text(&mut map).get(**f).is_some_and(Value::is_number)).collect();
        let original = parse_config(&serde_json::to_vec(&map).unwrap()).unwrap();
        for field in present {
            for value in [json!(-1), json!(1e18), json!(2.5), json!("4096"), json!([1]), json!({"a": 1}), json!(true)] {
                match parse_config(&with(&name, field, &value)) {
                    Err(error) => {
                        assert!(error.to_string().contains(field), "{name}: {field} = {value}: {error}");
                        refused += 1;
                    }
                    // A field that this family does not read.
                    Ok(spec) => assert_eq!(spec, original, "{name}: {field} = {value} was accepted"),
                }
            }
        }
    }
    assert!(refused > 5000, "{refused}");
}

#[test]
fn heads_that_do_not_divide_are_refused() {
    for name in fixtures::names() {
        let mut map = fields(&name);
        let original = parse_config(&serde_json::to_vec(&map).unwrap()).unwrap();
        let Some(kv_heads) = text(&mut map).get("num_key_value_heads").and_then(Value::as_u64) else { continue };
        let heads = text(&mut map)["num_attention_heads"].as_u64().unwrap();
        match parse_config(&with(&name, "num_key_value_heads", &json!(heads - 1))) {
            _ if heads < 4 => {}
            Err(error) => assert!(error.to_string().contains("num_key_value_heads"), "{name}: {error}"),
            Ok(spec) => assert_eq!(spec, original, "{name}: {} heads for {heads}, was {kv_heads}", heads - 1),
        }
    }
}

#[test]
fn lists_of_another_length_and_unknown_kinds_are_refused() {
    let lists = ["layer_types", "indexer_types", "hybrid_layer_pattern", "moe_layer_freq", "block_configs"];
    for name in fixtures::names() {
        let mut map = fields(&name);
        for field in lists {
            let Some(Value::Array(list)) = text(&mut map).get(field).cloned() else { continue };
            let shorter = json!(list[1..].to_vec());
            let error = parse_config(&with(&name, field, &shorter)).expect_err(&name).to_string();
            assert!(error.contains(field), "{name}: {error}");
            let mut odd = list;
            odd[0] = json!("quantum_attention");
            let error = parse_config(&with(&name, field, &json!(odd))).expect_err(&name).to_string();
            assert!(error.contains(field), "{name}: {error}");
        }
    }
}

#[test]
fn what_a_family_needs_is_missed_by_name() {
    for (name, field) in [
        ("deepseek-ai__DeepSeek-V3", "kv_lora_rank"),
        ("deepseek-ai__DeepSeek-V3", "num_experts_per_tok"),
        ("deepseek-ai__DeepSeek-V4-Flash", "compress_ratios"),
        ("zai-org__GLM-5", "index_head_dim"),
        ("openai__gpt-oss-120b", "num_local_experts"),
        ("Qwen__Qwen3-235B-A22B", "num_experts"),
        ("Qwen__Qwen3-Next-80B-A3B-Instruct-FP8", "linear_num_value_heads"),
        ("XiaomiMiMo__MiMo-V2-Flash", "hybrid_layer_pattern"),
        ("nvidia__NVIDIA-Nemotron-3-Nano-30B-A3B-NVFP4", "hybrid_override_pattern"),
        ("nvidia__Llama-3_3-Nemotron-Super-49B-v1", "block_configs"),
        ("moonshotai__Kimi-K3", "linear_attn_config"),
        ("google__gemma-7b", "num_key_value_heads"),
    ] {
        let error = parse_config(&with(name, field, &Value::Null)).expect_err(name).to_string();
        assert!(error.contains(field) && error.contains("missing"), "{name} without {field}: {error}");
    }
}
