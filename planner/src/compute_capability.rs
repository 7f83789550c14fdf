//! Which stored forms of weights and KV a card's arithmetic can take.

use crate::model::{DType, Element, Packed, Quantization, Storage};
use serde::{Deserialize, Serialize};

/// How a card runs a form of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Support {
    /// Products in the stored form.
    Native,
    /// Widened to 16 bits on the way to the tensor cores: saves memory and bandwidth, not arithmetic.
    WeightOnly,
}

/// A form that kernels on this card do not exist for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{form} needs compute capability {}.{} or higher; the card has {}.{}", needed.0, needed.1, found.0, found.1)]
pub struct TooOld {
    /// `fp8 weights`, `fp8 KV cache`.
    pub form: String,
    pub needed: (u32, u32),
    pub found: (u32, u32),
}

/// Ampere is the first with the asynchronous copies that Marlin's kernels are made of; they exist for Turing too.
const TURING: (u32, u32) = (7, 5);
const AMPERE: (u32, u32) = (8, 0);
const ADA: (u32, u32) = (8, 9);
const BLACKWELL: (u32, u32) = (10, 0);

/// Every form that a checkpoint uses; the weaker support counts.
///
/// # Errors
/// [`TooOld`], naming the form.
pub fn check_weights(quantization: &Quantization, card: (u32, u32)) -> Result<Support, TooOld> {
    let Quantization::Stored(stored) = quantization else { return Ok(Support::Native) };
    let mut support = Support::Native;
    for storage in [stored.linear, stored.experts] {
        if let Storage::Packed(packed) = storage {
            support = support.max(packed_on(&packed, card)?);
        }
    }
    Ok(support)
}

/// Minimum capabilities as vLLM's quantisation methods state them (`get_min_capability`), and where their kernels
/// compute in the stored form.
pub fn packed_on(packed: &Packed, card: (u32, u32)) -> Result<Support, TooOld> {
    let (needed, native) = match (packed.element, packed.bits) {
        // W4A16, W8A16: Marlin, AWQ, GPTQ.
        (Element::Integer, _) => (TURING, None),
        (Element::NormalFloat, _) => ((7, 0), None),
        (Element::Float, 8) => (AMPERE, Some(ADA)),
        // Microscaling FP4 runs widened on Ampere and Hopper.
        (Element::Float, _) => (AMPERE, Some(BLACKWELL)),
    };
    if card < needed {
        return Err(TooOld { form: format!("{} weights", packed.name()), needed, found: card });
    }
    Ok(if native.is_some_and(|native| card >= native) { Support::Native } else { Support::WeightOnly })
}

/// An fp8 cache is read by kernels from Ampere on (FlashInfer, Triton).
///
/// # Errors
/// [`TooOld`].
pub fn check_kv_cache(dtype: DType, card: (u32, u32)) -> Result<(), TooOld> {
    let (form, needed) = match dtype {
        DType::F8E4M3 | DType::F8E5M2 => ("fp8 KV cache", AMPERE),
        DType::BF16 => ("bf16 KV cache", AMPERE),
        _ => return Ok(()),
    };
    if card < needed { Err(TooOld { form: form.to_owned(), needed, found: card }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::model::Scales;

    #[test]
    fn forms_need_their_cards() {
        let int4 = Packed::integers(4, Scales::Group { columns: 128 }, true);
        let fp8 = Packed::fp8(Scales::Tensor);
        let table = [
            (int4, (7, 0), None),
            (int4, (7, 5), Some(Support::WeightOnly)),
            (int4, (9, 0), Some(Support::WeightOnly)),
            (fp8, (7, 5), None),
            (fp8, (8, 0), Some(Support::WeightOnly)),
            (fp8, (8, 9), Some(Support::Native)),
            (fp8, (9, 0), Some(Support::Native)),
            (Packed::NVFP4, (9, 0), Some(Support::WeightOnly)),
            (Packed::NVFP4, (10, 0), Some(Support::Native)),
            (Packed::MXFP4, (12, 0), Some(Support::Native)),
        ];
        for (packed, card, expected) in table {
            assert_eq!(packed_on(&packed, card).ok(), expected, "{} on {card:?}", packed.name());
        }
        let error = packed_on(&fp8, (7, 5)).unwrap_err().to_string();
        assert_eq!(error, "fp8 weights needs compute capability 8.0 or higher; the card has 7.5");
        assert!(check_kv_cache(DType::F8E4M3, (7, 5)).is_err() && check_kv_cache(DType::F16, (7, 0)).is_ok());
    }
}
