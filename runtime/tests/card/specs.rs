//! The models that are tried: the bundled one, and small ones of every family with weights made up.
#![allow(clippy::unwrap_used)]

use super::any_device::{Failure, Model};
use mserve_planner::model::{
    Activation, AttentionSpec, DType, Extras, Family, Ffn, LayerSpec, Mask, Mixer, MlpSpec, ModelSpec, Norm, NormKind,
    Positions, QkNorm, Quantization, RopeScaling, RopeSpec, Task,
};
use mserve_runtime::weights::{RandomWeights, StoredType};
use std::path::{Path, PathBuf};

/// Weights made up, stored as bf16, so that every device starts from the same numbers.
pub fn random(name: &str, spec: ModelSpec) -> Model {
    let weights = RandomWeights { seed: 3, stored: StoredType::BF16 };
    Model { name: name.to_owned(), spec, weights: Box::new(weights) }
}

/// The bundled model: text that means something, and near ties as real text has them.
pub fn demo() -> Result<Model, Failure> {
    Model::from_checkpoint(&demo_dir())
}

/// Cargo names the package's folder when it runs a test, which need not be where it was built.
pub fn demo_dir() -> PathBuf {
    let here = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    Path::new(&here).join("../examples/demo-model")
}

/// A small dense decoder of a family; `heads` is (query heads, KV heads, head_dim).
pub fn decoder(family: Family, heads: (u64, u64, u64), hidden: u64, vocab: u64, layers: usize) -> ModelSpec {
    let (num_heads, num_kv_heads, head_dim) = heads;
    let attention = AttentionSpec {
        num_heads,
        num_kv_heads,
        head_dim,
        scale: (head_dim as f64).powf(-0.5),
        mask: Mask::Causal,
        softcap: None,
        rope: Some(RopeSpec { theta: 500_000.0, rotary_dim: head_dim, scaling: RopeScaling::None }),
        qk_norm: if family == Family::Qwen3 { QkNorm::PerHead } else { QkNorm::None },
        qkv_bias: family == Family::Qwen2,
        output_bias: false,
        ..AttentionSpec::grouped(num_heads, num_kv_heads, head_dim)
    };
    let mlp = MlpSpec { intermediate_size: 2 * hidden, activation: Activation::Silu, gated: true, bias: false };
    ModelSpec {
        architecture: format!("{family:?}"),
        family,
        task: Task::Generate,
        hidden_size: hidden,
        vocab_size: vocab,
        max_position_embeddings: 2048,
        dtype: DType::BF16,
        norm: Norm { kind: NormKind::Rms, eps: 1e-5, unit_offset: false },
        positions: Positions::Rope,
        embedding_scale: None,
        tied_embeddings: family == Family::Qwen2,
        final_logit_softcap: None,
        layers: vec![LayerSpec { mixer: Mixer::Attention(attention), ffn: Ffn::Dense(mlp) }; layers],
        quantization: Quantization::None,
        extras: Extras::default(),
    }
}

/// One of each family and head size; odd vocabularies.
pub fn families() -> Vec<Model> {
    let mut sliding = decoder(Family::Mistral, (8, 2, 80), 384, 1003, 2);
    sliding.layers.iter_mut().for_each(|l| l.attention_mut().unwrap().mask = Mask::Sliding { window: 40 });
    let mut half_sliding = decoder(Family::Qwen2, (4, 4, 32), 128, 777, 3);
    half_sliding.layers[1].attention_mut().unwrap().mask = Mask::Sliding { window: 17 };
    let mut output_bias = decoder(Family::Llama, (4, 4, 96), 192, 1111, 2);
    for attention in output_bias.layers.iter_mut().filter_map(LayerSpec::attention_mut) {
        (attention.qkv_bias, attention.output_bias) = (true, true);
    }
    vec![
        random("llama, head_dim 128, 4 queries a KV head", decoder(Family::Llama, (8, 2, 128), 512, 5000, 2)),
        random("qwen2, head_dim 64, 7 queries a KV head", decoder(Family::Qwen2, (14, 2, 64), 896, 3001, 2)),
        random("qwen3, head_dim 128, 12 queries a KV head", decoder(Family::Qwen3, (12, 1, 128), 256, 2000, 2)),
        random("mistral, head_dim 80, window 40", sliding),
        random("llama, head_dim 96, biases", output_bias),
        random("qwen2, head_dim 32, one layer of three with a window", half_sliding),
        random("llama, head_dim 16", decoder(Family::Llama, (4, 2, 16), 64, 1001, 1)),
    ]
}
