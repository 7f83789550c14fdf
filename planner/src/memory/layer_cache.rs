//! What each layer keeps for a sequence, on one rank.

use super::served_dtype;
use crate::model::{
    AttentionSpec, CompressedAttentionSpec, DType, KvOrigin, LatentAttentionSpec, Mixer, ModelSpec, StateKind,
    StateSpec, Task,
};
use serde::{Deserialize, Serialize};

/// Type of cached K and V.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvFormat {
    pub dtype: DType,
    /// Sparse attention's fp8 latents keep rope elements in bf16 and scales beside them (`fp8_ds_mla`, the rule on
    /// NVIDIA cards); false: a byte for each element.
    pub fp8_ds_mla: bool,
}

impl From<DType> for KvFormat {
    fn from(dtype: DType) -> Self {
        Self { dtype, fp8_ds_mla: true }
    }
}

/// One cache of one layer. A layer may have several: latent and indexer, attention and state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LayerCache {
    pub kind: CacheKind,
    /// Of one entry: a token, a compressed state, or a sequence's whole state.
    pub bytes_per_entry: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum CacheKind {
    /// All tokens.
    Full,
    /// The last tokens.
    Sliding { window_tokens: u64 },
    /// Tokens of the current chunk.
    Chunked { chunk_tokens: u64 },
    /// One entry for so many tokens (DeepSeek-V4).
    Compressed { tokens_per_entry: u64 },
    /// Keys of an indexer, for all tokens.
    Indexer,
    /// A recurrent state: one entry for a sequence, however long.
    State,
}

impl CacheKind {
    /// Grows with the sequence without bound.
    pub fn grows(self) -> bool {
        matches!(self, Self::Full | Self::Compressed { .. } | Self::Indexer)
    }
}

/// fp8 latents of sparse attention: 512 bytes, four float32 scales, 64 rope elements in bf16 (vLLM, `fp8_ds_mla`).
const FP8_DS_MLA_BYTES: u64 = 656;
/// DeepSeek-V4's latents (vLLM, `models/deepseek_v4/attention.py`).
const DEEPSEEK_V4_BYTES: u64 = 584;

/// Caches of every layer; empty lists for models that do not generate and layers that keep nothing.
pub fn layer_caches(spec: &ModelSpec, tensor_parallel_size: u64, format: KvFormat) -> Vec<Vec<LayerCache>> {
    let rank = Rank { spec, tp: tensor_parallel_size.max(1), format };
    let keeps = spec.task == Task::Generate;
    spec.layers.iter().map(|layer| if keeps { rank.mixer(&layer.mixer) } else { Vec::new() }).collect()
}

struct Rank<'a> {
    spec: &'a ModelSpec,
    tp: u64,
    format: KvFormat,
}

impl Rank<'_> {
    fn mixer(&self, mixer: &Mixer) -> Vec<LayerCache> {
        match mixer {
            Mixer::Attention(a) => self.attention(a),
            Mixer::Latent(a) => self.latent(a),
            Mixer::Compressed(a) => self.compressed(a),
            Mixer::State(s) => vec![self.state(s)],
            Mixer::Parallel { attention, state } => {
                let mut caches = self.attention(attention);
                caches.push(self.state(state));
                caches
            }
            // The image's keys and values are the image's, not the text's.
            Mixer::Cross(_) | Mixer::None => Vec::new(),
        }
    }

    fn attention(&self, a: &AttentionSpec) -> Vec<LayerCache> {
        if matches!(a.kv, KvOrigin::SharedWith { .. }) {
            return Vec::new();
        }
        // Every rank needs at least one whole head: fewer heads than ranks are replicated.
        let heads = (a.num_kv_heads / self.tp).max(1);
        let bytes_per_entry = heads * (a.head_dim + a.value_head_dim) * self.format.dtype.bytes();
        let kind = match a.mask {
            crate::model::Mask::Sliding { window } => CacheKind::Sliding { window_tokens: window },
            crate::model::Mask::Chunked { chunk } => CacheKind::Chunked { chunk_tokens: chunk },
            _ => CacheKind::Full,
        };
        let indexer = a.indexer.filter(|i| i.own).map(|i| self.indexer_keys(i.head_dim));
        std::iter::once(LayerCache { kind, bytes_per_entry }).chain(indexer).collect()
    }

    fn latent(&self, a: &LatentAttentionSpec) -> Vec<LayerCache> {
        let fp8 = self.format.dtype.bytes() == 1;
        let bytes_per_entry = match &a.indexer {
            Some(_) if fp8 && self.format.fp8_ds_mla && a.latent_dim() == 576 => FP8_DS_MLA_BYTES,
            _ => a.latent_dim() * self.format.dtype.bytes(),
        };
        let indexer = a.indexer.filter(|i| i.own).map(|i| fp8_keys(i.head_dim));
        std::iter::once(LayerCache { kind: CacheKind::Full, bytes_per_entry }).chain(indexer).collect()
    }

    /// Plain keys of a block-sparse indexer.
    fn indexer_keys(&self, head_dim: u64) -> LayerCache {
        LayerCache { kind: CacheKind::Indexer, bytes_per_entry: head_dim * self.format.dtype.bytes() }
    }

    fn compressed(&self, a: &CompressedAttentionSpec) -> Vec<LayerCache> {
        let latent = if a.head_dim == 512 { DEEPSEEK_V4_BYTES } else { a.head_dim * 2 };
        let window = CacheKind::Sliding { window_tokens: a.window };
        let mut caches = vec![LayerCache { kind: window, bytes_per_entry: latent }];
        if a.tokens_per_state == 0 {
            return caches;
        }
        let compressed = CacheKind::Compressed { tokens_per_entry: a.tokens_per_state };
        caches.push(LayerCache { kind: compressed, bytes_per_entry: latent });
        caches.push(compressor_state(a.tokens_per_state, a.head_dim));
        if let Some(indexer) = &a.indexer {
            let keys = fp8_keys(indexer.head_dim);
            caches.push(LayerCache { kind: compressed, ..keys });
            caches.push(compressor_state(a.tokens_per_state, indexer.head_dim));
        }
        caches
    }

    fn state(&self, s: &StateSpec) -> LayerCache {
        let served = served_dtype(self.spec).bytes();
        let recurrent = s.state_elements().div_ceil(self.tp) * s.state_dtype.map_or(served, DType::bytes);
        let channels = match s.kind {
            // Groups that do not divide are repeated, with whole groups on every rank.
            StateKind::Mamba2 if !s.key_heads.is_multiple_of(self.tp) => {
                s.inner_size() / self.tp + 2 * s.key_heads.div_ceil(self.tp) * s.key_head_dim
            }
            _ => s.conv_channels().div_ceil(self.tp),
        };
        let convolution = channels * s.conv_kernel.saturating_sub(1) * served;
        LayerCache { kind: CacheKind::State, bytes_per_entry: recurrent + convolution }
    }
}

/// An fp8 key with a float32 scale for each 128 elements (DeepSeek-V3.2).
fn fp8_keys(head_dim: u64) -> LayerCache {
    LayerCache { kind: CacheKind::Indexer, bytes_per_entry: head_dim + head_dim.div_ceil(128) * 4 }
}

/// Keys and scores of the tokens that the next compressed state is made of, in float32; overlapping ones twice.
fn compressor_state(tokens: u64, head_dim: u64) -> LayerCache {
    let overlap = if tokens <= 4 { 2 } else { 1 };
    let width = overlap * head_dim;
    LayerCache { kind: CacheKind::State, bytes_per_entry: overlap * tokens * 2 * width * 4 }
}
