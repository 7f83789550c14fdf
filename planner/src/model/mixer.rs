//! What mixes tokens in a layer: attention in its kinds, recurrent state, or both.

use super::DType;
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", tag = "mixer")]
pub enum Mixer {
    /// K and V for each head: MHA, GQA, MQA, whole or within a window.
    Attention(AttentionSpec),
    /// DeepSeek's MLA: one compressed vector for all heads.
    Latent(LatentAttentionSpec),
    /// DeepSeek-V4: K and V compressed over tokens, with a window of plain ones beside them.
    Compressed(CompressedAttentionSpec),
    /// Mamba and linear attention: a state of fixed size for each sequence.
    State(StateSpec),
    /// Falcon-H1, Hymba: attention and state side by side in one layer.
    Parallel { attention: AttentionSpec, state: StateSpec },
    /// Mllama: attends to the image's tokens; keeps nothing for the text.
    Cross(AttentionSpec),
    /// A layer that is its FFN alone (Nemotron-H, pruned models).
    None,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AttentionSpec {
    pub num_heads: u64,
    pub num_kv_heads: u64,
    pub head_dim: u64,
    /// Width of a value head; differs from `head_dim` in MiMo-V2.
    pub value_head_dim: u64,
    /// Factor on q·k, usually head_dim^-0.5.
    pub scale: f64,
    pub mask: Mask,
    /// Gemma 2: scores become cap * tanh(score / cap).
    pub softcap: Option<f64>,
    pub rope: Option<RopeSpec>,
    pub qk_norm: QkNorm,
    pub qkv_bias: bool,
    pub output_bias: bool,
    /// A learned score per head that takes part in the softmax and in nothing else (gpt-oss, MiMo-V2).
    pub sinks: bool,
    pub gate: OutputGate,
    pub kv: KvOrigin,
    /// A cheap scorer that picks the blocks to attend to (MiniMax M3).
    pub indexer: Option<IndexerSpec>,
}

impl AttentionSpec {
    /// Causal, without positions, norms, biases or anything special. Scale: head_dim^-0.5.
    pub fn grouped(num_heads: u64, num_kv_heads: u64, head_dim: u64) -> Self {
        Self {
            num_heads,
            num_kv_heads,
            head_dim,
            value_head_dim: head_dim,
            scale: (head_dim as f64).powf(-0.5),
            mask: Mask::Causal,
            softcap: None,
            rope: None,
            qk_norm: QkNorm::None,
            qkv_bias: false,
            output_bias: false,
            sinks: false,
            gate: OutputGate::None,
            kv: KvOrigin::Projected,
            indexer: None,
        }
    }

    /// What of it goes beyond plain grouped-query attention with per-head norms; `None` when nothing does.
    pub fn variant(&self) -> Option<&'static str> {
        let plain_norm = matches!(self.qk_norm, QkNorm::None | QkNorm::PerHead);
        match self {
            a if a.sinks => Some("attention sinks"),
            a if a.indexer.is_some() => Some("block-sparse attention"),
            a if a.gate != OutputGate::None => Some("gated attention output"),
            a if matches!(a.kv, KvOrigin::SharedWith { .. }) => Some("KV shared between layers"),
            a if a.kv == KvOrigin::KeyIsValue => Some("values equal to keys"),
            a if a.value_head_dim != a.head_dim => Some("value heads of another width"),
            _ if !plain_norm => Some("QK norm over all heads"),
            a if matches!(a.mask, Mask::Chunked { .. }) => Some("chunked attention"),
            _ => None,
        }
    }
}

/// Which earlier (and later) tokens a token sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Mask {
    Causal,
    /// The last `window` tokens, itself included.
    Sliding {
        window: u64,
    },
    /// Tokens of its own chunk of the sequence (Llama 4).
    Chunked {
        chunk: u64,
    },
    Bidirectional,
    /// Encoders with local layers: `window` tokens around (ModernBERT).
    BidirectionalSliding {
        window: u64,
    },
}

impl Mask {
    /// Tokens that a query sees at most; `None`: all.
    pub fn reach(self) -> Option<u64> {
        match self {
            Self::Causal | Self::Bidirectional => None,
            Self::Sliding { window } | Self::BidirectionalSliding { window } => Some(window),
            Self::Chunked { chunk } => Some(chunk),
        }
    }
}

/// Norms on queries and keys, before rope.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QkNorm {
    None,
    /// RMSNorm over head_dim, one weight for all heads (Qwen3, Gemma 3).
    PerHead,
    /// Over all heads together, or with a weight of their own for each head (OLMo 2, MiniMax M2, Cohere).
    AllHeads,
    /// Normalised without weights (Llama 4).
    Weightless,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutputGate {
    None,
    /// One factor for each output (Qwen3-Next, Kimi K3): as large as the query projection's output.
    PerElement,
    /// One factor for each head (Step 3.x).
    PerHead,
}

/// Where a layer's K and V come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kv")]
pub enum KvOrigin {
    Projected,
    /// No value projection: the projected key serves as value too (Gemma 4, full layers). Both are cached.
    KeyIsValue,
    /// Reads the cache of an earlier layer and keeps none (Gemma 3n and 4, Hunyuan).
    SharedWith {
        layer: u64,
    },
}

/// Multi-head latent attention. Cached per token: `kv_lora_rank + qk_rope_head_dim`, whatever the TP size.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LatentAttentionSpec {
    pub num_heads: u64,
    /// `None`: queries are projected in one step.
    pub q_lora_rank: Option<u64>,
    pub kv_lora_rank: u64,
    pub qk_nope_head_dim: u64,
    pub qk_rope_head_dim: u64,
    pub v_head_dim: u64,
    pub rope: Option<RopeSpec>,
    pub bias: bool,
    pub gate: OutputGate,
    /// DeepSeek sparse attention.
    pub indexer: Option<IndexerSpec>,
}

impl LatentAttentionSpec {
    /// Elements cached for a token.
    pub fn latent_dim(&self) -> u64 {
        self.kv_lora_rank + self.qk_rope_head_dim
    }
}

/// Picks the `topk` tokens (or blocks) that attention looks at. Caches one key of `head_dim` for each token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct IndexerSpec {
    pub num_heads: u64,
    pub head_dim: u64,
    pub topk: u64,
    /// False: takes over what an earlier layer picked, and has neither weights nor cache (GLM-5.2).
    pub own: bool,
}

/// DeepSeek-V4's attention: keys and values of one head, over a window and over compressed states.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CompressedAttentionSpec {
    pub num_heads: u64,
    pub head_dim: u64,
    pub rope_dim: u64,
    pub q_lora_rank: u64,
    pub o_lora_rank: u64,
    pub o_groups: u64,
    pub window: u64,
    /// Tokens in one compressed state; 0: the window alone.
    pub tokens_per_state: u64,
    pub indexer: Option<IndexerSpec>,
}

/// A recurrent mixer. Its state has `value_heads * value_head_dim * key_head_dim` elements.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StateSpec {
    pub kind: StateKind,
    /// Mamba: its heads (Mamba-1: all inner channels, each a head of one).
    pub value_heads: u64,
    pub value_head_dim: u64,
    /// Mamba-2: groups of B and C.
    pub key_heads: u64,
    /// Mamba: the state's size.
    pub key_head_dim: u64,
    /// Taps of the causal convolution; 0 without one.
    pub conv_kernel: u64,
    /// Type of the recurrent state in memory. `None`: as served.
    pub state_dtype: Option<DType>,
    /// Mamba-1: width of the projection that the step sizes come from. Kimi delta: rank of the output gate, 0 if full.
    pub dt_rank: u64,
    pub bias: bool,
    pub conv_bias: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StateKind {
    Mamba1,
    Mamba2,
    /// Qwen3-Next, Qwen3.5.
    GatedDeltaNet,
    /// Kimi Linear, K3.
    KimiDelta,
    /// MiniMax-01, Ling 2.5: decaying linear attention.
    Lightning,
    /// LFM2: a short gated convolution and no state behind it.
    ShortConv,
}

impl StateSpec {
    pub fn inner_size(&self) -> u64 {
        self.value_heads * self.value_head_dim
    }

    /// Channels that pass the convolution, and whose last `conv_kernel - 1` inputs are kept.
    pub fn conv_channels(&self) -> u64 {
        match self.kind {
            StateKind::Mamba1 | StateKind::ShortConv => self.inner_size(),
            StateKind::Lightning => 0,
            StateKind::Mamba2 | StateKind::GatedDeltaNet | StateKind::KimiDelta => {
                self.inner_size() + 2 * self.key_heads * self.key_head_dim
            }
        }
    }

    /// Elements of the recurrent state of one sequence.
    pub fn state_elements(&self) -> u64 {
        match self.kind {
            StateKind::ShortConv => 0,
            _ => self.inner_size() * self.key_head_dim,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RopeSpec {
    pub theta: f64,
    /// Leading dimensions of a head that rotate (all of them unless partial_rotary_factor says otherwise).
    pub rotary_dim: u64,
    pub scaling: RopeScaling,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum RopeScaling {
    None,
    /// Positions divided by `factor`.
    Linear {
        factor: f64,
    },
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_position: u64,
    },
    Yarn {
        factor: f64,
        beta_fast: f64,
        beta_slow: f64,
        attention_factor: f64,
        original_max_position: u64,
    },
    /// NTK-aware base that grows with the sequence beyond the original length.
    Dynamic {
        factor: f64,
        original_max_position: u64,
    },
    /// Phi-3: one factor per frequency, the long list beyond `original_max_position`.
    LongRope {
        short: Vec<f64>,
        long: Vec<f64>,
        attention_factor: f64,
        original_max_position: u64,
    },
}
