//! What a `config.json` says, validated: nothing optional is left that an op would need.

use super::{AttentionSpec, DType, Ffn, Mixer, Quantization, StateSpec};
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
    pub extras: Extras,
}

/// Which reader of `config.json` and which `Program` an architecture belongs to. One file each under `config/`.
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
    Afmoe,
    Apertus,
    Arcee,
    Baichuan,
    Bamba,
    /// Encoders near BERT: MPNet, DeBERTa, ELECTRA, gte, Jina.
    BertLike,
    /// Llama with biases by flags of their own: InternLM 1 and 3, Seed-OSS, MiMo.
    Biased,
    Bloom,
    ChatGlm,
    Cohere,
    Cwm,
    Dbrx,
    DeciLm,
    DeepseekV2,
    DeepseekV3,
    DeepseekV4,
    DistilBert,
    Ernie4_5,
    Exaone,
    Exaone4,
    ExaoneMoe,
    Falcon,
    FalconH1,
    Gemma,
    Gemma3n,
    Gemma4,
    Glm4,
    Glm4Moe,
    GlmMoeDsa,
    Gpt2,
    GptBigCode,
    GptJ,
    GptNeoX,
    GptOss,
    Granite,
    GraniteMoe,
    GraniteMoeHybrid,
    Grok,
    Hunyuan,
    InternLm2,
    Jamba,
    KimiLinear,
    Lfm2,
    Llama4,
    LongCat,
    Mamba,
    Mamba2,
    MiMoV2,
    MiniCpm,
    MiniCpm3,
    MiniMax,
    MiniMaxM2,
    MiniMaxM3,
    Mixtral,
    Mllama,
    ModernBert,
    Mpt,
    Nemotron,
    NemotronH,
    NomicBert,
    Olmo,
    Olmo2,
    OlmoE,
    Opt,
    Phi,
    Phi3Small,
    PhiMoe,
    Qwen,
    Qwen2Moe,
    Qwen3Moe,
    Qwen3Next,
    SmolLm3,
    SolarOpen,
    StableLm,
    StarCoder2,
    Step3p5,
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

/// One block of the stack: what mixes tokens, then what works on each token alone.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerSpec {
    pub mixer: Mixer,
    pub ffn: Ffn,
}

/// What few models have beside their layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Extras {
    /// Layers of multi-token prediction that the checkpoint carries behind the model. Counted apart: engines load them
    /// for speculative decoding only.
    pub mtp_layers: u64,
    pub lm_head_bias: bool,
    /// The language model of an image-and-text checkpoint; its towers are not described.
    pub image_text: bool,
    pub per_layer_input: Option<PerLayerInput>,
    /// Copies of the residual stream (DeepSeek-V4's hyper-connections); 1 is an ordinary residual.
    pub residual_streams: Option<u64>,
}

/// Gemma 3n and 4: a second embedding table with one narrow vector for each token and layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct PerLayerInput {
    pub vocab_size: u64,
    pub width: u64,
    /// Gemma 3n: rank of the learned residual beside attention; 0 for none.
    pub laurel_rank: u64,
    /// Gemma 3n: copies of the stream that take turns (AltUp); 0 for none.
    pub altup_inputs: u64,
}

impl ModelSpec {
    /// The same weights served for another purpose, e.g. a causal model as an embedding model.
    pub fn with_task(mut self, task: Task) -> Self {
        self.task = task;
        self
    }
}

impl LayerSpec {
    /// Grouped-query attention of this layer, when that is what mixes its tokens.
    pub fn attention(&self) -> Option<&AttentionSpec> {
        match &self.mixer {
            Mixer::Attention(attention) | Mixer::Parallel { attention, .. } => Some(attention),
            _ => None,
        }
    }

    pub fn attention_mut(&mut self) -> Option<&mut AttentionSpec> {
        match &mut self.mixer {
            Mixer::Attention(attention) | Mixer::Parallel { attention, .. } => Some(attention),
            _ => None,
        }
    }

    /// The recurrent state that this layer keeps.
    pub fn state(&self) -> Option<&StateSpec> {
        match &self.mixer {
            Mixer::State(state) | Mixer::Parallel { state, .. } => Some(state),
            _ => None,
        }
    }
}
