//! The one parser of `config.json`: bytes in, a validated [`ModelSpec`] out.
//!
//! Every number is checked against `limits` before anything is sized by it. What cannot be planned exactly is an
//! error that names the field, never a guess.

mod architecture;
mod base;
mod class_defaults;
mod decoder;
mod encoder;
mod error;
mod families;
mod fields;
mod json;
mod limits;
mod masks;
mod moe;
mod quantization;
mod rope;
#[cfg(test)]
mod tests;

use super::{Activation, DType, Family, Ffn, KvOrigin, LayerSpec, Mixer, ModelSpec};
use fields::Fields;

pub use architecture::known_architectures;
pub use error::ConfigError;

/// Read the bytes of a model's `config.json`.
///
/// # Errors
/// [`ConfigError`], naming the field, what it holds and what would do.
pub fn parse_config(json: &[u8]) -> Result<ModelSpec, ConfigError> {
    let mut quoted = Vec::new();
    let map = fields::parse_object(json, &mut quoted)?;
    let root = Fields::new(&map);
    let architecture = architecture::find(&root)?;
    let spec = match (families::reader(&architecture), architecture.family) {
        (Some(reader), _) => reader(&architecture, &root),
        (None, Family::Bert | Family::XlmRoberta) => encoder::spec(&architecture, &root),
        (None, _) => decoder::spec(&architecture, &root),
    }?;
    refuse_unread(&root, &spec)?;
    Ok(spec)
}

/// Fields that make another model of it, in a file whose class was not read for them: experts in a dense class, latent
/// or shared caches in one that keeps whole ones.
fn refuse_unread(root: &Fields<'_>, spec: &ModelSpec) -> Result<(), ConfigError> {
    let text = base::text_of(root)?;
    let has = |is: fn(&LayerSpec) -> bool| spec.layers.iter().any(is);
    let refuse = |name: &str, value: &dyn ToString| {
        let supported = format!("supported: other classes than {}", spec.architecture);
        Err(text.unsupported(name, &value.to_string(), supported))
    };
    for name in moe::NUMBER {
        // One expert is none.
        if let Some(count) = text.value(name).and_then(json::Value::as_u64).filter(|&count| count > 1)
            && !has(|layer| matches!(layer.ffn, Ffn::Experts(_)))
            && !switched_off(&text)?
        {
            return refuse(name, &count);
        }
    }
    if let Some(rank) = text.value("kv_lora_rank").and_then(json::Value::as_u64)
        && !has(|layer| matches!(layer.mixer, Mixer::Latent(_)))
        && text.boolean("use_mla")? != Some(false)
    {
        return refuse("kv_lora_rank", &rank);
    }
    if text.value("per_layer_config").is_some() && spec.family != Family::Gemma4 {
        return refuse("per_layer_config", &"set");
    }
    let shares = |layer: &LayerSpec| layer.attention().is_some_and(|a| matches!(a.kv, KvOrigin::SharedWith { .. }));
    if text.boolean("use_cla")? == Some(true) && !has(shares) {
        return refuse("use_cla", &true);
    }
    Ok(())
}

/// Gemma 4 counts experts that a flag keeps out.
fn switched_off(text: &Fields<'_>) -> Result<bool, ConfigError> {
    Ok(text.boolean("enable_moe_block")? == Some(false))
}

impl ModelSpec {
    /// The same model with what `hf_quant_config.json` says: ModelOpt writes its quantisation there, sometimes only
    /// there.
    ///
    /// # Errors
    /// [`ConfigError`] for a broken file or a method that is not supported.
    pub fn with_hf_quant_config(mut self, json: &[u8]) -> Result<Self, ConfigError> {
        let mut quoted = Vec::new();
        let map = fields::parse_object(json, &mut quoted)?;
        if let Some(quantization) = quantization::from_hf_quant_config(&Fields::new(&map))? {
            self.quantization = quantization;
        }
        Ok(self)
    }
}

fn dtype(root: &Fields<'_>, text: &Fields<'_>) -> Result<DType, ConfigError> {
    const NAMES: [&str; 2] = ["torch_dtype", "dtype"];
    let (owner, found) = match text.string(&NAMES)? {
        Some(found) => (text, Some(found)),
        None => (root, root.string(&NAMES)?),
    };
    match found {
        Some((_, "bfloat16")) => Ok(DType::BF16),
        Some((_, "float16" | "half")) => Ok(DType::F16),
        // PyTorch's own default, which is what a file without the field was saved in.
        Some((_, "float32" | "float")) | None => Ok(DType::F32),
        Some((name, other)) => Err(owner.unsupported(name, other, "supported: bfloat16, float16, float32")),
    }
}

fn activation(fields: &Fields<'_>, names: &[&'static str], default: Activation) -> Result<Activation, ConfigError> {
    let Some((field, name)) = fields.string(names)? else { return Ok(default) };
    match name {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu" => Ok(Activation::Gelu),
        "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh" => Ok(Activation::GeluTanh),
        "relu" => Ok(Activation::Relu),
        "tanh" => Ok(Activation::Tanh),
        "relu2" | "relu_squared" => Ok(Activation::ReluSquared),
        "swigluoai" | "swiglu_oai" | "gegelu" | "situ" | "xielu" => Ok(Activation::Special),
        other => Err(fields.unsupported(field, other, "supported: silu, gelu, gelu_pytorch_tanh, relu, relu2, tanh")),
    }
}
