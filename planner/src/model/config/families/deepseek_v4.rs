//! DeepSeek V4: keys and values of one head, compressed over tokens; hyper-connections; experts everywhere.

use super::super::architecture::Architecture;
use super::super::base::Base;
use super::super::{ConfigError, fields::Fields, limits};
use crate::model::{CompressedAttentionSpec, Extras, Ffn, IndexerSpec, LayerSpec, Mixer, ModelSpec, MoeSpec, Router};

/// Tokens in a state whose layers also pick states with an indexer.
const INDEXED_RATIO: u64 = 4;

pub(in super::super) fn spec(arch: &Architecture, root: &Fields<'_>) -> Result<ModelSpec, ConfigError> {
    let base = Base::read(arch, root)?;
    let attention = CompressedAttentionSpec {
        num_heads: base.heads,
        head_dim: base.need("head_dim", limits::HEAD_DIM)?,
        rope_dim: base.need("qk_rope_head_dim", limits::HEAD_DIM)?,
        q_lora_rank: base.need("q_lora_rank", limits::RANK)?,
        o_lora_rank: base.need("o_lora_rank", limits::RANK)?,
        o_groups: base.need("o_groups", limits::HEADS)?,
        window: base.need("sliding_window", limits::POSITIONS)?,
        tokens_per_state: 0,
        indexer: None,
    };
    if !base.heads.is_multiple_of(attention.o_groups) {
        let expected = format!("a divisor of num_attention_heads, {}", base.heads);
        return Err(base.text.out_of_range("o_groups", &attention.o_groups, expected));
    }
    let indexer = IndexerSpec {
        num_heads: base.need("index_n_heads", limits::HEADS)?,
        head_dim: base.need("index_head_dim", limits::HEAD_DIM)?,
        topk: base.need("index_topk", limits::POSITIONS)?,
        own: true,
    };
    // The list goes on behind the last layer for multi-token prediction.
    let ratios = match base.numbers("compress_ratios", base.layers as usize)? {
        Some(ratios) => ratios,
        None => ratios_of_kinds(&base)?,
    };
    if let Some(&ratio) = ratios.iter().find(|&&ratio| ratio > 65_536) {
        return Err(base.text.out_of_range("compress_ratios", &ratio, "0 to 65536 tokens in a state"));
    }
    let moe = base.with_shared(base.experts()?)?;
    let ffn = Ffn::Experts(MoeSpec { router: Router::ScoreCorrected, ..moe });
    let layers = ratios.into_iter().take(base.layers as usize).map(|tokens_per_state| {
        let indexer = (tokens_per_state == INDEXED_RATIO).then_some(indexer);
        let mixer = Mixer::Compressed(CompressedAttentionSpec { tokens_per_state, indexer, ..attention.clone() });
        LayerSpec { mixer, ffn: ffn.clone() }
    });
    let spec = base.spec(layers.collect())?;
    let residual_streams = base.get(&["hc_mult"], 1..=64)?;
    Ok(ModelSpec { extras: Extras { residual_streams, ..spec.extras }, ..spec })
}

/// `layer_types` with `compress_rates`, as transformers 5 writes them.
fn ratios_of_kinds(base: &Base<'_>) -> Result<Vec<u64>, ConfigError> {
    let (Some(kinds), Some(rates)) = (base.words("layer_types")?, base.text.object("compress_rates")?) else {
        return Err(ConfigError::Missing {
            field: base.text.path("compress_ratios"),
            expected: "tokens in a compressed state, for each layer".to_owned(),
        });
    };
    let ratio = |kind: &str| match kind {
        "sliding_attention" => Ok(0),
        "compressed_sparse_attention" => rates.required_uint(&["compressed_sparse_attention"], 1..=65_536),
        "heavily_compressed_attention" => rates.required_uint(&["heavily_compressed_attention"], 1..=65_536),
        other => Err(base.text.unsupported(
            "layer_types",
            other,
            "supported: sliding_attention, compressed_sparse_attention, heavily_compressed_attention",
        )),
    };
    kinds.into_iter().map(ratio).collect()
}
