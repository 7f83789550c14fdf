//! Models beyond the corpus, by their figures: config.json in short (as published, or as transformers 5 writes it),
//! parameters as published or as transformers' own class counts them, caches by the formulas. `fixtures/beyond.tsv`.
#![allow(clippy::unwrap_used)]

use crate::golden::{caches, close};
use mserve_planner::model::{families, parse_config};

const TSV: &str = include_str!("../fixtures/beyond.tsv");

#[test]
fn models_beyond_the_corpus_have_their_parameters_and_caches() {
    let (mut off, mut totals) = (Vec::new(), 0);
    for line in TSV.lines().skip(1) {
        let [name, config, parameters, expected, source] = line.split('\t').collect::<Vec<_>>().try_into().unwrap();
        let spec = match parse_config(config.as_bytes()) {
            Ok(spec) => spec,
            Err(error) => {
                off.push(format!("{name}: {error}"));
                continue;
            }
        };
        let ours = families::program(&spec).parameters();
        if !parameters.is_empty() {
            totals += 1;
            if !close(ours as f64, parameters) {
                off.push(format!("{name}: {ours} parameters against {parameters} ({source})"));
            }
        }
        if caches(&spec) != expected {
            off.push(format!("{name}: {} against {expected} by the formulas", caches(&spec)));
        }
    }
    assert!(off.is_empty(), "{}", off.join("\n"));
    assert!(totals >= 78, "{totals}");
}

/// What makes another model of a file is never passed over.
#[test]
fn fields_of_other_kinds_of_models_are_refused_by_name() {
    let llama = |rest: &str| {
        let file = format!(
            r#"{{"architectures":["LlamaForCausalLM"],"hidden_size":64,"num_hidden_layers":2,"num_attention_heads":4,
            "num_key_value_heads":2,"intermediate_size":128,"vocab_size":100,"max_position_embeddings":128,{rest}}}"#
        );
        parse_config(file.as_bytes())
    };
    assert!(llama(r#""num_experts":1,"num_local_experts":0,"kv_lora_rank":null,"use_cla":false"#).is_ok());
    for (field, rest) in [
        ("num_experts", r#""num_experts":8"#),
        ("num_local_experts", r#""num_local_experts":8,"num_experts_per_tok":2"#),
        ("kv_lora_rank", r#""kv_lora_rank":512"#),
        ("use_cla", r#""use_cla":true"#),
        ("per_layer_config", r#""per_layer_config":{"0":{"head_dim":8}}"#),
    ] {
        let error = llama(rest).expect_err(field).to_string();
        assert!(error.contains(field), "{field}: {error}");
    }
}
