//! What a `config.json` says, validated: nothing optional is left that an op would need.

use super::DType;
use serde::{Deserialize, Serialize};

/// A model as the rest of mserve knows it. Every layer is listed, every dimension is explicit.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModelSpec {
    /// `architectures[0]` of the file, e.g. `LlamaForCausalLM`.
    pub architecture: String,
    pub family: Family,
    pub task: Task,
    pub hidden_size: u64,
    pub vocab_size: u64,
    /// Positions the model accepts (context length), after rope scaling.
    pub max_position_embeddings: u64,
    /// Type of the stored weights (`torch_dtype`), where a tensor has no header of its own.
    pub dtype: DType,
    pub norm: Norm,
    pub positions: Positions,
    /// Gemma multiplies embeddings by sqrt(hidden_size).
    pub embedding_scale: Option<f64>,
    /// `lm_head` shares the embedding table.
    pub tied_embeddings: bool,
    pub final_logit_softcap: Option<f64>,
    pub layers: Vec<LayerSpec>,
    pub quantization: Quantization,
}

/// Families whose `Program` is known. One file each under `families/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    Phi3,
    Gemma2,
    Gemma3,
    Bert,
    XlmRoberta,
}

/// What the model is served as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "task")]
pub enum Task {
    /// Next-token logits: chat and completions.
    Generate,
    /// One vector per text.
    Embed { pooling: super::Pooling },
    /// `labels` scores per text (cross-encoder rerankers have one).
    Classify { labels: u64 },
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Norm {
    pub kind: NormKind,
    pub eps: f64,
    /// The stored weight is an offset from one: y = x̂ * (1 + w) (Gemma).
    pub unit_offset: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormKind {
    Rms,
    Layer,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Positions {
    /// Rotary, per attention: see [`AttentionSpec::rope`].
    Rope,
    /// A table of `rows` learned vectors; token i reads row `i + offset` (RoBERTa starts after its padding index).
    Learned { rows: u64, offset: u64, token_types: u64 },
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerSpec {
    pub attention: AttentionSpec,
    pub mlp: MlpSpec,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AttentionSpec {
    pub num_heads: u64,
    pub num_kv_heads: u64,
    pub head_dim: u64,
    /// Factor on q·k, usually head_dim^-0.5.
    pub scale: f64,
    pub mask: Mask,
    /// Gemma 2: scores become cap * tanh(score / cap).
    pub softcap: Option<f64>,
    pub rope: Option<RopeSpec>,
    /// RMSNorm over head_dim of every q and k head, before rope (Qwen3, Gemma 3).
    pub qk_norm: bool,
    pub qkv_bias: bool,
    pub output_bias: bool,
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
    Bidirectional,
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

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct MlpSpec {
    pub intermediate_size: u64,
    pub activation: Activation,
    /// act(gate) * up, two matrices in, one out.
    pub gated: bool,
    pub bias: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    Silu,
    /// Exact, with erf.
    Gelu,
    GeluTanh,
    Relu,
    Tanh,
}

/// How the checkpoint stores its linear weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "method")]
pub enum Quantization {
    /// Plain tensors of [`ModelSpec::dtype`].
    None,
    /// Integer weights packed in groups along the input dimension (GPTQ, AWQ). `group_size` 0: one group a row.
    Grouped { bits: u64, group_size: u64 },
    /// E4M3 weights with scales; `kv_cache` says whether the checkpoint asks for an fp8 KV cache too.
    Fp8 { kv_cache: bool },
}

impl ModelSpec {
    /// The same weights served for another purpose, e.g. a causal model as an embedding model.
    pub fn with_task(mut self, task: Task) -> Self {
        self.task = task;
        self
    }
}
