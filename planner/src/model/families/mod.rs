//! The ops of a model. Families that a backend can run have a file each; `planned` describes all others by their spec.

mod bert;
mod experts;
mod gemma;
mod llama;
mod mixers;
mod naming;
mod phi3;
mod planned;

use super::tail::gather_early;
use super::{Activation, AttentionSpec, Extras, Family, Ffn, LayerSpec, Mixer, MlpSpec, ModelSpec, Program};

/// The ops of a model, in order, as this runtime runs them: rows without an output end in the last layer's attention.
pub fn program(spec: &ModelSpec) -> Program {
    gather_early(whole_layers(spec))
}

/// The ops of a model, in order, as vLLM and SGLang run them: every token goes through all layers and the last norm.
pub fn whole_layers(spec: &ModelSpec) -> Program {
    if !plain(spec) {
        return planned::program(spec);
    }
    match spec.family {
        Family::Llama | Family::Mistral | Family::Qwen2 | Family::Qwen3 => llama::program(spec),
        Family::Bert | Family::XlmRoberta => bert::program(spec),
        Family::Phi3 => phi3::program(spec),
        Family::Gemma2 | Family::Gemma3 => gemma::program(spec),
        _ => planned::program(spec),
    }
}

/// Parameters of the checkpoint's layers for multi-token prediction: each is the model's last layer again, the product
/// that joins it to the stack, and three norms. Not part of [`program`].
pub fn mtp_parameters(spec: &ModelSpec) -> u64 {
    let Some(last) = spec.layers.last().filter(|_| spec.extras.mtp_layers > 0) else { return 0 };
    let with = ModelSpec { layers: vec![last.clone(); 2], ..spec.clone() };
    let without = ModelSpec { layers: vec![last.clone()], ..spec.clone() };
    let layer = program(&with).parameters().saturating_sub(program(&without).parameters());
    let joined = 2 * spec.hidden_size * spec.hidden_size + 3 * spec.hidden_size;
    spec.extras.mtp_layers.saturating_mul(layer.saturating_add(joined))
}

/// Only attention that ops describe whole, and dense MLPs.
fn plain(spec: &ModelSpec) -> bool {
    spec.extras == Extras { mtp_layers: spec.extras.mtp_layers, ..Extras::default() }
        && spec.layers.iter().all(|layer| plain_parts(layer).is_some())
}

/// What a plain layer is made of.
type Parts<'a> = (&'a AttentionSpec, &'a MlpSpec);

/// Attention and MLP of a layer that is nothing else.
fn plain_parts(layer: &LayerSpec) -> Option<Parts<'_>> {
    match (&layer.mixer, &layer.ffn) {
        (Mixer::Attention(attention), Ffn::Dense(mlp)) => {
            let plain = attention.variant().is_none() && mlp.activation != Activation::Special;
            plain.then_some((attention, mlp))
        }
        _ => None,
    }
}
