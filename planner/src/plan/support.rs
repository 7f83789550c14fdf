//! Which quantised weights and cache types a card's generation can work with.

use super::PlanRequest;
use crate::gpus;
use crate::memory::served_dtype;
use crate::model::{DType, Element, Quantization, Storage};
use serde::{Deserialize, Serialize};
use std::fmt;

/// A form of weights or cache that no engine runs on the card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unsupported {
    /// `fp4 weights`
    pub what: String,
    pub card: String,
    pub compute_capability: (u32, u32),
    pub needs: (u32, u32),
    /// Name for `--gpu` of the smallest card that runs it and holds the model, as many of them.
    pub smallest_card: Option<String>,
}

impl fmt::Display for Unsupported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ((major, minor), (needs_major, needs_minor)) = (self.compute_capability, self.needs);
        write!(
            f,
            "{} need compute capability {needs_major}.{needs_minor}, and {} has {major}.{minor}",
            self.what, self.card
        )
    }
}

/// The least generation that has kernels for a form of weights, and the one that multiplies in it. vLLM,
/// `docs/features/quantization/README.md` and `get_min_capability` of each method: below the second, weights are
/// widened while they are multiplied (Marlin).
fn generations(element: Element, bits: u64) -> ((u32, u32), (u32, u32)) {
    match (element, bits) {
        (Element::Float, 8) => ((8, 0), (8, 9)),
        (Element::Float, _) => ((8, 0), (10, 0)),
        (Element::Integer, 8) => ((7, 5), (7, 5)),
        (Element::Integer | Element::NormalFloat, _) => ((7, 5), (7, 5)),
    }
}

/// Forms that the checkpoint has.
fn forms(request: &PlanRequest<'_>) -> Vec<(Element, u64, String)> {
    let Quantization::Stored(stored) = &request.spec.quantization else { return Vec::new() };
    let packed = [stored.linear, stored.experts].into_iter().filter_map(|storage| match storage {
        Storage::Packed(packed) => Some((packed.element, packed.bits, packed.name())),
        Storage::Plain => None,
    });
    packed.collect()
}

/// What of the request the card cannot do. Cards that are not in the table are not judged.
pub(super) fn check(request: &PlanRequest<'_>) -> Result<(), Unsupported> {
    let Ok(gpu) = gpus::find(&request.card.name) else { return Ok(()) };
    let refuse = |what: String, needs: (u32, u32)| {
        if gpu.compute_capability >= needs {
            return Ok(());
        }
        let (card, compute_capability) = (request.card.name.clone(), gpu.compute_capability);
        Err(Unsupported { what, card, compute_capability, needs, smallest_card: None })
    };
    for (element, bits, name) in forms(request) {
        refuse(format!("{name} weights"), generations(element, bits).0)?;
    }
    if request.kv_cache_dtype.resolve(request.spec) == DType::F8E4M3 {
        refuse("fp8 KV caches".to_owned(), (8, 0))?;
    }
    Ok(())
}

/// bfloat16 came with compute capability 8.0; engines serve such checkpoints in float16 before it.
pub(super) fn half_note(request: &PlanRequest<'_>) -> Option<String> {
    let gpu = gpus::find(&request.card.name).ok()?;
    let (major, minor) = gpu.compute_capability;
    (served_dtype(request.spec) == DType::BF16 && (major, minor) < (8, 0)).then(|| {
        format!(
            "{} {major}.{minor} has no bfloat16: engines serve this model in float16 there (vLLM: --dtype half), in as \
             many bytes.",
            gpu.full_name
        )
    })
}

/// Weights that are smaller, and not faster, on this card.
pub(super) fn note(request: &PlanRequest<'_>) -> Option<String> {
    let gpu = gpus::find(&request.card.name).ok()?;
    let cc = gpu.compute_capability;
    let (_, bits, name) =
        forms(request).into_iter().find(|(element, bits, _)| *bits < 16 && cc < generations(*element, *bits).1)?;
    let bytes = if bits == 8 { "halved" } else { "quartered" };
    Some(format!(
        "{} {}.{} does not multiply in {name}: weights are widened on the way; their bytes are {bytes}, prompts are no \
         faster.",
        gpu.full_name, cc.0, cc.1
    ))
}
