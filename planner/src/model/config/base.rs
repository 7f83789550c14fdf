//! What most decoders say, read under the names that most files use. Family files add what is theirs.

use super::architecture::{self, Architecture};
use super::json::Value;
use super::{ConfigError, activation, class_defaults, dtype, fields::Fields, limits, quantization, rope};
use crate::model::{
    Activation, AttentionSpec, Extras, Family, Ffn, LayerSpec, Mask, Mixer, MlpSpec, ModelSpec, Norm, NormKind,
    Positions, QkNorm, RopeScaling, RopeSpec,
};
use std::ops::RangeInclusive;

/// Objects in which files that describe more than a language model keep it.
const NESTED: [&str; 5] = ["text_config", "llm_config", "language_config", "language_model_config", "thinker_config"];

/// The language model's own object, or the whole file.
pub(super) fn text_of<'a>(root: &Fields<'a>) -> Result<Fields<'a>, ConfigError> {
    for name in NESTED {
        if let Some(nested) = root.object(name)? {
            // Omni models keep the text one level deeper.
            let text = nested.object("text_config")?.unwrap_or(nested);
            let model_type = text.string(&["model_type"])?.map_or("", |(_, name)| name);
            return Ok(text.with_defaults(class_defaults::of(model_type)));
        }
    }
    Ok(*root)
}

pub(super) struct Base<'a> {
    pub(super) arch: Architecture,
    pub(super) root: Fields<'a>,
    pub(super) text: Fields<'a>,
    pub(super) hidden: u64,
    pub(super) layers: u64,
    pub(super) heads: u64,
}

impl<'a> Base<'a> {
    pub(super) fn read(arch: &Architecture, root: &Fields<'a>) -> Result<Self, ConfigError> {
        let text = text_of(root)?;
        let hidden = text.required_uint(&["hidden_size", "n_embd", "d_model", "n_embed"], limits::HIDDEN)?;
        let names = ["num_hidden_layers", "num_layers", "n_layer", "n_layers"];
        let layers = text.required_uint(&names, limits::LAYERS)?;
        let heads = text.required_uint(&["num_attention_heads", "n_head", "n_heads"], limits::HEADS)?;
        Ok(Self { arch: *arch, root: *root, text, hidden, layers, heads })
    }

    /// For models without attention heads of their own.
    pub(super) fn without_heads(arch: &Architecture, root: &Fields<'a>) -> Result<Self, ConfigError> {
        let text = text_of(root)?;
        let hidden = text.required_uint(&["hidden_size", "d_model"], limits::HIDDEN)?;
        let layers = text.required_uint(&["num_hidden_layers", "n_layer"], limits::LAYERS)?;
        Ok(Self { arch: *arch, root: *root, text, hidden, layers, heads: 1 })
    }

    pub(super) fn need(&self, name: &'static str, range: RangeInclusive<u64>) -> Result<u64, ConfigError> {
        self.text.required_uint(&[name], range)
    }

    pub(super) fn get(&self, names: &[&'static str], range: RangeInclusive<u64>) -> Result<Option<u64>, ConfigError> {
        self.text.uint(names, range)
    }

    /// A number for all layers, or a list with the same number for each (Hunyuan).
    pub(super) fn same(&self, names: &[&'static str], range: RangeInclusive<u64>) -> Result<Option<u64>, ConfigError> {
        let listed = names.iter().find(|&&name| self.text.value(name).is_some_and(Value::is_array));
        let Some(&name) = listed else { return self.get(names, range) };
        let numbers = self.numbers(name, self.layers as usize)?.unwrap_or_default();
        match numbers.first() {
            Some(first) if range.contains(first) && numbers.iter().all(|n| n == first) => Ok(Some(*first)),
            _ => {
                let expected = format!("the same number for all layers, {} to {}", range.start(), range.end());
                Err(self.text.out_of_range(name, "a list of others", expected))
            }
        }
    }

    pub(super) fn flag(&self, name: &'static str) -> Result<bool, ConfigError> {
        Ok(self.text.boolean(name)?.unwrap_or(false))
    }

    /// KV heads; every family that groups queries writes them down.
    pub(super) fn kv_heads(&self) -> Result<u64, ConfigError> {
        self.kv_heads_or(None)
    }

    /// Multi-head attention where the file says nothing: families from before grouped queries.
    pub(super) fn kv_heads_or_all(&self) -> Result<u64, ConfigError> {
        self.kv_heads_or(Some(self.heads))
    }

    fn kv_heads_or(&self, default: Option<u64>) -> Result<u64, ConfigError> {
        const NAMES: [&str; 4] = ["num_key_value_heads", "n_head_kv", "num_kv_heads", "multi_query_group_num"];
        let expected = || format!("a divisor of num_attention_heads, {}", self.heads);
        let kv_heads = match self.get(&NAMES, limits::HEADS)?.or(default) {
            Some(kv_heads) => kv_heads,
            None => return Err(ConfigError::Missing { field: self.text.path(NAMES[0]), expected: expected() }),
        };
        if self.heads.is_multiple_of(kv_heads) {
            return Ok(kv_heads);
        }
        Err(self.text.out_of_range(NAMES[0], &kv_heads, expected()))
    }

    /// Explicit wins over hidden / heads, which must divide.
    pub(super) fn head_dim(&self) -> Result<u64, ConfigError> {
        match self.get(&["head_dim", "kv_channels", "attention_head_dim"], limits::HEAD_DIM)? {
            Some(head_dim) => Ok(head_dim),
            None => super::decoder::quotient(&self.text, self.hidden, self.heads),
        }
    }

    /// Causal attention of every layer: heads, KV heads, head size, `attention_bias` on q, k, v and o.
    pub(super) fn attention(&self, kv_heads: u64) -> Result<AttentionSpec, ConfigError> {
        let head_dim = self.head_dim()?;
        let bias = self.flag("attention_bias")?;
        let grouped = AttentionSpec::grouped(self.heads, kv_heads, head_dim);
        Ok(AttentionSpec { rope: self.rope(head_dim)?, qkv_bias: bias, output_bias: bias, ..grouped })
    }

    /// Base and rotated dimensions. Scalings that only the planner meets are left to the context length.
    pub(super) fn rope(&self, head_dim: u64) -> Result<Option<RopeSpec>, ConfigError> {
        const THETA: [&str; 3] = ["rope_theta", "rotary_emb_base", "rope_embedding_base"];
        let parameters = self.text.object("rope_parameters")?;
        let nested = match &parameters {
            Some(parameters) => parameters.float(&["rope_theta"], limits::ROPE_THETA)?,
            None => None,
        };
        let theta = nested.or(self.text.float(&THETA, limits::ROPE_THETA)?).unwrap_or(1e4);
        let names = ["partial_rotary_factor", "rotary_pct", "rope_pct"];
        let factor = self.text.float(&names, 0.0..=1.0)?.unwrap_or(1.0);
        let rotary_dim = self
            .get(&["rotary_dim"], 0..=*limits::HEAD_DIM.end())?
            .unwrap_or((head_dim as f64 * factor) as u64)
            .min(head_dim);
        Ok(Some(RopeSpec { theta, rotary_dim, scaling: RopeScaling::None }))
    }

    /// A gated MLP of `intermediate_size`.
    pub(super) fn mlp(&self) -> Result<MlpSpec, ConfigError> {
        const NAMES: [&str; 5] = ["intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim", "ff_intermediate_size"];
        match self.text.uint(&NAMES, limits::INTERMEDIATE)? {
            Some(size) => self.mlp_of(size),
            None => self.mlp_of(self.need(NAMES[0], limits::INTERMEDIATE)?),
        }
    }

    pub(super) fn mlp_of(&self, intermediate_size: u64) -> Result<MlpSpec, ConfigError> {
        let names = ["hidden_act", "hidden_activation", "mlp_hidden_act", "activation_function", "activation"];
        let activation = activation(&self.text, &names, Activation::Silu)?;
        Ok(MlpSpec { intermediate_size, activation, gated: true, bias: self.flag("mlp_bias")? })
    }

    /// Layers that are all alike.
    pub(super) fn uniform(&self, attention: AttentionSpec, mlp: MlpSpec) -> Vec<LayerSpec> {
        let layer = LayerSpec { mixer: Mixer::Attention(attention), ffn: Ffn::Dense(mlp) };
        vec![layer; self.layers as usize]
    }

    /// A flag for each layer, given as a list (of 0 and 1, or booleans).
    pub(super) fn flags(&self, owner: &Fields<'_>, name: &'static str) -> Result<Option<Vec<bool>>, ConfigError> {
        let Some(list) = owner.list(name)? else { return Ok(None) };
        self.check_length(owner, name, list)?;
        let flag = |value: &Value<'_>| match value {
            Value::Bool(flag) => Ok(*flag),
            Value::Number(n) if matches!(n.as_u64(), Some(0 | 1)) => Ok(n.as_u64() == Some(1)),
            other => Err(owner.wrong_type(name, other, "a list of 0 and 1")),
        };
        list.iter().map(flag).collect::<Result<_, _>>().map(Some)
    }

    /// A word for each layer.
    pub(super) fn words(&self, name: &'static str) -> Result<Option<Vec<&'a str>>, ConfigError> {
        let Some(list) = self.text.list(name)? else { return Ok(None) };
        self.check_length(&self.text, name, list)?;
        let word = |value: &'a Value<'a>| match value {
            Value::String(word) => Ok(word.as_ref()),
            other => Err(self.text.wrong_type(name, other, "a list of strings")),
        };
        list.iter().map(word).collect::<Result<_, _>>().map(Some)
    }

    /// A number for each layer.
    pub(super) fn numbers(&self, name: &'static str, at_least: usize) -> Result<Option<Vec<u64>>, ConfigError> {
        let Some(list) = self.text.list(name)? else { return Ok(None) };
        if list.len() < at_least || list.len() as u64 > 2 * limits::LAYERS.end() {
            let expected = format!("one entry for each of the {at_least} layers");
            return Err(self.text.out_of_range(name, &format!("a list of {}", list.len()), expected));
        }
        let number =
            |value: &Value<'_>| value.as_u64().ok_or_else(|| self.text.wrong_type(name, value, "whole numbers"));
        list.iter().map(number).collect::<Result<_, _>>().map(Some)
    }

    fn check_length(&self, owner: &Fields<'_>, name: &'static str, list: &[Value<'_>]) -> Result<(), ConfigError> {
        if list.len() as u64 == self.layers {
            return Ok(());
        }
        let expected = format!("one entry for each of the {} layers", self.layers);
        Err(owner.out_of_range(name, &format!("a list of {}", list.len()), expected))
    }

    /// Masks from `layer_types`, where the file has them; else by `slides`.
    pub(super) fn masks(&self, slides: impl Fn(u64) -> bool) -> Result<Vec<Mask>, ConfigError> {
        let kinds = self.words("layer_types")?;
        let window = self.get(&["sliding_window"], limits::POSITIONS)?;
        let missing = || ConfigError::Missing {
            field: self.text.path("sliding_window"),
            expected: "the window's tokens, because some layers slide".to_owned(),
        };
        let sliding = |i: u64| match kinds.as_ref().map(|kinds| kinds[i as usize]) {
            None => Ok(slides(i)),
            Some("full_attention") => Ok(false),
            Some("sliding_attention") => Ok(true),
            Some(other) => {
                Err(self.text.unsupported("layer_types", other, "supported: full_attention, sliding_attention"))
            }
        };
        (0..self.layers)
            .map(|i| match (sliding(i)?, window) {
                (false, _) => Ok(Mask::Causal),
                (true, Some(window)) => Ok(Mask::Sliding { window }),
                (true, None) => Err(missing()),
            })
            .collect()
    }

    pub(super) fn vocab(&self) -> Result<u64, ConfigError> {
        let own = self.text.uint(&["vocab_size", "padded_vocab_size"], limits::VOCAB)?;
        match own.or(self.root.uint(&["vocab_size"], limits::VOCAB)?) {
            Some(vocab) => Ok(vocab),
            None => self.need("vocab_size", limits::VOCAB),
        }
    }

    /// Context length; the smallest of the lengths that a file states (vLLM, `_get_and_verify_max_len`), stretched.
    pub(super) fn context(&self) -> Result<u64, ConfigError> {
        const NAMES: [&str; 7] = [
            "max_position_embeddings",
            "n_positions",
            "max_seq_len",
            "seq_length",
            "model_max_length",
            "max_sequence_length",
            "max_target_positions",
        ];
        let mut stated = None;
        for name in NAMES {
            if let Some(length) = self.get(&[name], limits::POSITIONS)? {
                stated = Some(stated.map_or(length, |s: u64| s.min(length)));
            }
        }
        let stated = match (stated, self.arch.family) {
            (Some(stated), _) => stated,
            // Without positions there is no length; a million tokens is what such models are tried with.
            (None, Family::Mamba | Family::Mamba2) => 1 << 20,
            // Files of these leave out the 2,048 tokens that the models were trained on.
            (None, Family::Bloom | Family::Falcon) => 2048,
            (None, _) => self.need(NAMES[0], limits::POSITIONS)?,
        };
        rope::planned_context(&self.text, stated)
    }

    pub(super) fn rms(&self) -> Result<Norm, ConfigError> {
        self.norm(NormKind::Rms)
    }

    pub(super) fn norm(&self, kind: NormKind) -> Result<Norm, ConfigError> {
        const NAMES: [&str; 7] = [
            "rms_norm_eps",
            "layer_norm_eps",
            "layer_norm_epsilon",
            "layernorm_epsilon",
            "norm_eps",
            "norm_epsilon",
            "block_norm_eps",
        ];
        let eps = self.text.float(&NAMES, limits::EPS)?.unwrap_or(1e-5);
        Ok(Norm { kind, eps, unit_offset: false })
    }

    /// All together: RMSNorm, rotary positions, head of its own unless tied.
    pub(super) fn spec(&self, layers: Vec<LayerSpec>) -> Result<ModelSpec, ConfigError> {
        let tied = tied(&self.text, &self.root)?;
        let mtp_layers = self.get(&["num_nextn_predict_layers", "mtp_num_hidden_layers"], 0..=64)?.unwrap_or(0);
        Ok(ModelSpec {
            architecture: self.arch.name.to_owned(),
            family: self.arch.family,
            task: architecture::task(&self.arch, &self.root)?,
            hidden_size: self.hidden,
            vocab_size: self.vocab()?,
            max_position_embeddings: self.context()?,
            dtype: dtype(&self.root, &self.text)?,
            norm: self.rms()?,
            positions: Positions::Rope,
            embedding_scale: None,
            tied_embeddings: tied.unwrap_or(false),
            final_logit_softcap: None,
            layers,
            quantization: quantization::read(&self.root, &self.text)?,
            extras: Extras { mtp_layers, image_text: self.arch.image_text(), ..Extras::default() },
        })
    }

    /// Ties embeddings where the file does not say and the family's class does.
    pub(super) fn tied_by_default(&self, spec: ModelSpec) -> Result<ModelSpec, ConfigError> {
        let stated = tied(&self.text, &self.root)?;
        Ok(ModelSpec { tied_embeddings: stated.unwrap_or(true), ..spec })
    }
}

/// Whether the head shares the embedding table. Where the language model and the whole contradict each other
/// (transformers 5 writes class defaults into both), published checkpoints have a head of their own.
pub(super) fn tied(text: &Fields<'_>, root: &Fields<'_>) -> Result<Option<bool>, ConfigError> {
    const FIELD: &str = "tie_word_embeddings";
    Ok(match (text.boolean(FIELD)?, root.boolean(FIELD)?) {
        (Some(inner), Some(outer)) => Some(inner && outer),
        (stated, None) | (None, stated) => stated,
    })
}

pub(super) fn attention_layer(attention: AttentionSpec, ffn: Ffn) -> LayerSpec {
    LayerSpec { mixer: Mixer::Attention(attention), ffn }
}

/// QK norm over every head, by a flag.
pub(super) fn per_head(on: bool) -> QkNorm {
    if on { QkNorm::PerHead } else { QkNorm::None }
}
