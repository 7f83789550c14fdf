//! Which tensor-parallel sizes a model can be cut into.

use crate::model::{
    AttentionSpec, Element, Ffn, Mixer, MlpSpec, ModelSpec, Packed, Quantization, Role, StateKind, StateSpec, Storage,
};
use serde::{Deserialize, Serialize};

/// Why a size is not legal: a dimension that does not divide.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{dimension} {value} does not divide into {tensor_parallel_size} ranks")]
pub struct Indivisible {
    pub dimension: String,
    pub value: u64,
    pub tensor_parallel_size: u64,
}

/// Check one size. Query heads and the MLP must divide; KV heads must divide, or be divided by the ranks and then
/// replicated; each rank's part of a quantised row must hold whole groups. The vocabulary is padded instead.
///
/// # Errors
/// [`Indivisible`], naming the first dimension that does not.
pub fn check(spec: &ModelSpec, tensor_parallel_size: u64) -> Result<(), Indivisible> {
    let ranks = Ranks(tensor_parallel_size.max(1));
    if ranks.0 == 1 {
        return Ok(());
    }
    for layer in &spec.layers {
        ranks.mixer(&layer.mixer)?;
        match &layer.ffn {
            Ffn::None => {}
            Ffn::Dense(mlp) => ranks.mlp(spec, "intermediate_size", mlp, Role::Linear)?,
            Ffn::Experts(moe) => {
                ranks.mlp(spec, "moe_intermediate_size", &moe.expert, Role::Experts)?;
                for mlp in moe.shared.iter().chain(&moe.dense) {
                    ranks.mlp(spec, "shared_expert_intermediate_size", mlp, Role::Linear)?;
                }
            }
        }
    }
    Ok(())
}

struct Ranks(u64);

impl Ranks {
    fn divides(&self, dimension: &str, value: u64) -> Result<(), Indivisible> {
        if value.is_multiple_of(self.0) {
            return Ok(());
        }
        Err(Indivisible { dimension: dimension.to_owned(), value, tensor_parallel_size: self.0 })
    }

    /// Divided between the ranks, or each of them on several ranks.
    fn divides_or_repeats(&self, dimension: &str, value: u64) -> Result<(), Indivisible> {
        if self.0.is_multiple_of(value.max(1)) { Ok(()) } else { self.divides(dimension, value) }
    }

    fn mixer(&self, mixer: &Mixer) -> Result<(), Indivisible> {
        match mixer {
            Mixer::Attention(a) | Mixer::Cross(a) => self.attention(a),
            Mixer::Latent(a) => self.divides("num_attention_heads", a.num_heads),
            Mixer::Compressed(a) => {
                self.divides("num_attention_heads", a.num_heads)?;
                self.divides_or_repeats("o_groups", a.o_groups)
            }
            Mixer::State(state) => self.state(state),
            Mixer::Parallel { attention, state } => {
                self.attention(attention)?;
                self.state(state)
            }
            Mixer::None => Ok(()),
        }
    }

    fn attention(&self, a: &AttentionSpec) -> Result<(), Indivisible> {
        self.divides("num_attention_heads", a.num_heads)?;
        self.divides_or_repeats("num_key_value_heads", a.num_kv_heads)
    }

    fn state(&self, state: &StateSpec) -> Result<(), Indivisible> {
        match state.kind {
            StateKind::Mamba1 | StateKind::ShortConv => self.divides("the mixer's inner size", state.inner_size()),
            StateKind::Mamba2 => {
                self.divides("mamba_num_heads", state.value_heads)?;
                // Groups are repeated when they do not divide, which takes one group or a divisor.
                if state.key_heads == 1 { Ok(()) } else { self.divides_or_repeats("mamba n_groups", state.key_heads) }
            }
            StateKind::GatedDeltaNet | StateKind::KimiDelta | StateKind::Lightning => {
                self.divides("linear_num_value_heads", state.value_heads)?;
                self.divides("linear_num_key_heads", state.key_heads)
            }
        }
    }

    fn mlp(&self, spec: &ModelSpec, name: &str, mlp: &MlpSpec, role: Role) -> Result<(), Indivisible> {
        let size = mlp.intermediate_size;
        self.divides(name, size)?;
        let Quantization::Stored(stored) = &spec.quantization else { return Ok(()) };
        let storage = if role == Role::Experts { stored.experts } else { stored.linear };
        let Storage::Packed(packed) = storage else { return Ok(()) };
        match packed.group_columns() {
            Some(columns) if !(size / self.0).is_multiple_of(columns) && !spread_blocks(&packed) => Err(Indivisible {
                dimension: format!("{name} in quantisation groups"),
                value: size / columns,
                tensor_parallel_size: self.0,
            }),
            _ => Ok(()),
        }
    }
}

/// Microscaling kernels pad a rank's part to whole groups (gpt-oss at TP 4 and 8).
fn spread_blocks(packed: &Packed) -> bool {
    packed.element == Element::Float && packed.bits == 4
}

/// Legal sizes up to `max`, ascending. Always holds 1.
pub fn legal_sizes(spec: &ModelSpec, max: u64) -> Vec<u64> {
    (1..=max.max(1)).filter(|&tp| check(spec, tp).is_ok()).collect()
}
