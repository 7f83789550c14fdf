//! Programs for the unit tests of this module.
#![allow(clippy::unwrap_used)]

use mserve_planner::model::*;

/// A Llama of small sizes: hidden 64, 4 heads of 16 on 2 KV heads, vocabulary 512.
pub fn llama_spec(layers: usize) -> ModelSpec {
    llama_spec_of(layers, 16)
}

/// The same with heads of `head_dim`.
fn llama_spec_of(layers: usize, head_dim: u64) -> ModelSpec {
    let rope = RopeSpec { theta: 10_000.0, rotary_dim: head_dim, scaling: RopeScaling::None };
    let attention = AttentionSpec {
        num_heads: 4,
        num_kv_heads: 2,
        head_dim,
        scale: 0.25,
        mask: Mask::Causal,
        softcap: None,
        rope: Some(rope),

        qkv_bias: false,
        output_bias: false,
        ..AttentionSpec::grouped(4, 2, head_dim)
    };
    let mlp = MlpSpec { intermediate_size: 160, activation: Activation::Silu, gated: true, bias: false };
    ModelSpec {
        architecture: "LlamaForCausalLM".to_owned(),
        family: Family::Llama,
        task: Task::Generate,
        hidden_size: 64,
        vocab_size: 512,
        max_position_embeddings: 256,
        dtype: DType::BF16,
        norm: Norm { kind: NormKind::Rms, eps: 1e-5, unit_offset: false },
        positions: Positions::Rope,
        embedding_scale: None,
        tied_embeddings: true,
        final_logit_softcap: None,
        layers: vec![LayerSpec { mixer: Mixer::Attention(attention), ffn: Ffn::Dense(mlp) }; layers],
        quantization: Quantization::None,
        extras: Extras::default(),
    }
}

pub fn llama_program(layers: usize) -> Program {
    families::program(&llama_spec(layers))
}

pub fn llama_program_of(layers: usize, head_dim: u64) -> Program {
    families::program(&llama_spec_of(layers, head_dim))
}
