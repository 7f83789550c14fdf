//! Which layers look back over a window only. The rule is the family's; `layer_types` wins where a file has it.

use super::json::Value;
use super::{ConfigError, fields::Fields, limits};
use crate::model::{Family, Mask};

/// One mask per layer. A window as long as the context is no window.
pub(super) fn masks(fields: &Fields<'_>, family: Family, layers: u64, context: u64) -> Result<Vec<Mask>, ConfigError> {
    let window = window(fields, family)?;
    let rule = rule(fields, family)?;
    let explicit = layer_types(fields, layers)?;
    let sliding = |i: u64| match &explicit {
        Some(kinds) => kinds[i as usize],
        None => rule.slides(i),
    };
    (0..layers)
        .map(|i| match (sliding(i), window) {
            (false, _) => Ok(Mask::Causal),
            (true, Some(window)) if window < context => Ok(Mask::Sliding { window }),
            (true, Some(_)) => Ok(Mask::Causal),
            // `sliding_window: null` switches the window off (Mistral 0.2 and later), unless layers ask for it.
            (true, None) if explicit.is_none() => Ok(Mask::Causal),
            (true, None) => Err(ConfigError::Missing {
                field: fields.path("sliding_window"),
                expected: "the window's tokens, because layer_types names sliding layers".to_owned(),
            }),
        })
        .collect()
}

#[derive(Debug, Clone, Copy)]
enum Rule {
    Never,
    Always,
    /// Layers from this one on (Qwen).
    From(u64),
    /// Every n-th layer is full (Gemma).
    FullEvery(u64),
}

impl Rule {
    fn slides(self, layer: u64) -> bool {
        match self {
            Self::Never => false,
            Self::Always => true,
            Self::From(first) => layer >= first,
            Self::FullEvery(n) => !(layer + 1).is_multiple_of(n),
        }
    }
}

fn rule(fields: &Fields<'_>, family: Family) -> Result<Rule, ConfigError> {
    Ok(match family {
        Family::Mistral | Family::Phi3 => Rule::Always,
        Family::Qwen2 | Family::Qwen3 if fields.boolean("use_sliding_window")? == Some(true) => {
            // 28 is the class default; published files state it.
            Rule::From(fields.uint(&["max_window_layers"], 0..=*limits::LAYERS.end())?.unwrap_or(28))
        }
        Family::Gemma2 => Rule::FullEvery(2),
        Family::Gemma3 => {
            let names = ["sliding_window_pattern", "_sliding_window_pattern"];
            Rule::FullEvery(fields.uint(&names, limits::LAYERS)?.unwrap_or(6))
        }
        _ => Rule::Never,
    })
}

fn window(fields: &Fields<'_>, family: Family) -> Result<Option<u64>, ConfigError> {
    // Qwen states a window beside `use_sliding_window: false`.
    if matches!(family, Family::Qwen2 | Family::Qwen3) && fields.boolean("use_sliding_window")? != Some(true) {
        return Ok(None);
    }
    let stated = fields.uint(&["sliding_window"], limits::POSITIONS)?;
    Ok(stated.or(match family {
        // Class defaults of transformers; a multimodal file leaves them out of `text_config`.
        Family::Gemma2 | Family::Gemma3 => Some(4096),
        _ => None,
    }))
}

/// True for a sliding layer.
fn layer_types(fields: &Fields<'_>, layers: u64) -> Result<Option<Vec<bool>>, ConfigError> {
    const FIELD: &str = "layer_types";
    let Some(list) = fields.list(FIELD)? else { return Ok(None) };
    if list.len() as u64 != layers {
        let expected = format!("one entry for each of the {layers} layers");
        return Err(fields.out_of_range(FIELD, &format!("a list of {}", list.len()), expected));
    }
    let kinds = list.iter().map(|kind| match kind {
        Value::String(s) if s == "full_attention" => Ok(false),
        Value::String(s) if s == "sliding_attention" => Ok(true),
        Value::String(s) => Err(fields.unsupported(FIELD, s, "supported: full_attention, sliding_attention")),
        other => Err(fields.wrong_type(FIELD, other, "a list of strings")),
    });
    kinds.collect::<Result<_, _>>().map(Some)
}
