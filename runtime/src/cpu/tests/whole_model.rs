use crate::cpu::{CpuBackend, CpuOptions};
use crate::engine::{StepBatch, StepSequence};
use crate::weights::{RandomWeights, StoredType};
use mserve_planner::model::{Pooling, Task, parse_config};

fn config(architecture: &str, extra: &str) -> String {
    format!(
        r#"{{"architectures":["{architecture}"],"hidden_size":32,"num_hidden_layers":3,"num_attention_heads":4,
        "num_key_value_heads":2,"head_dim":8,"intermediate_size":48,"vocab_size":50,"max_position_embeddings":64,
        "rms_norm_eps":1e-5,"layer_norm_eps":1e-12,"hidden_act":"silu","torch_dtype":"float32","rope_theta":10000.0{extra}}}"#
    )
}

fn one_text(tokens: usize) -> StepBatch {
    StepBatch {
        token_ids: (0..tokens).map(|i| (i * 7 % 50) as u32).collect(),
        positions: (0..tokens as u32).collect(),
        slot_mapping: (0..tokens as u32).collect(),
        sequences: vec![StepSequence {
            query_start: 0,
            query_len: tokens,
            context_len: tokens,
            block_table: 0..tokens.div_ceil(16),
            wants_output: true,
            sampling: None,
        }],
        block_tables: (0..tokens.div_ceil(16) as u32).collect(),
    }
}

/// Every op must write what the next ones read: memory left over from a longer step must not shine through.
#[test]
fn nothing_is_read_that_this_step_did_not_write() {
    let bert = r#","model_type":"bert","type_vocab_size":2,"hidden_act":"gelu""#;
    let cases = [
        ("LlamaForCausalLM", r#","model_type":"llama""#, None),
        ("LlamaForCausalLM", r#","model_type":"llama""#, Some(Task::Embed { pooling: Pooling::Mean })),
        ("Gemma2ForCausalLM", GEMMA2, None),
        ("Gemma3ForCausalLM", GEMMA3, None),
        ("Phi3ForCausalLM", r#","model_type":"phi3","pad_token_id":0"#, None),
        ("BertModel", bert, Some(Task::Embed { pooling: Pooling::Cls })),
    ];
    for (architecture, extra, task) in cases {
        let json = config(architecture, extra)
            .replace(if extra.contains("hidden_act") { r#""hidden_act":"silu","# } else { "\0" }, "");
        let mut spec = parse_config(json.as_bytes()).unwrap_or_else(|e| panic!("{architecture}: {e}"));
        if let Some(task) = task {
            spec = spec.with_task(task);
        }
        let options =
            CpuOptions { threads: 2, kv_cache_bytes: 1 << 20, max_num_batched_tokens: 64, ..Default::default() };
        let source = RandomWeights { seed: 3, stored: StoredType::F32 };
        let mut backend = CpuBackend::load(&spec, &source, &options, &mut |_, _| {}).unwrap();
        let clean = backend.forward_rows(&one_text(21)).unwrap().to_vec();
        assert!(clean.iter().all(|v| v.is_finite()), "{architecture}");
        backend.poison();
        assert_eq!(backend.forward_rows(&one_text(21)).unwrap(), clean, "{architecture}");
    }
}

const GEMMA2: &str = r#","model_type":"gemma2","hidden_activation":"gelu_pytorch_tanh","query_pre_attn_scalar":8,
    "sliding_window":8,"attn_logit_softcapping":50.0,"final_logit_softcapping":30.0"#;
const GEMMA3: &str = r#","model_type":"gemma3_text","hidden_activation":"gelu_pytorch_tanh","query_pre_attn_scalar":8,
    "sliding_window":8,"rope_local_base_freq":10000.0,"sliding_window_pattern":2"#;
