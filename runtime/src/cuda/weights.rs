//! Where each weight lies on the card: one allocation, bf16, matrices that are multiplied together end to end.

use super::CudaError;
use super::arena::ALIGNMENT_BYTES;
use mserve_planner::model::{Op, Program, WeightId};

const BF16_BYTES: u64 = 2;

/// Offset of every weight into the allocation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightLayout {
    offsets: Vec<u64>,
    pub bytes: u64,
}

impl WeightLayout {
    /// Parts of one product (q, k, v; gate, up) follow one another without a gap, so that they are one matrix.
    ///
    /// # Errors
    /// When two products share a part but not their neighbours: no family does.
    pub fn new(program: &Program) -> Result<Self, CudaError> {
        let mut layout = Placing { program, offsets: vec![None; program.weights.len()], bytes: 0 };
        for op in &program.ops {
            if let Op::Linear { weights, .. } = op {
                layout.run(&weights.parts)?;
                layout.run(&weights.biases)?;
            }
        }
        for id in 0..program.weights.len() {
            if layout.offsets[id].is_none() {
                layout.run(&[WeightId(id)])?;
            }
        }
        let bytes = layout.bytes.next_multiple_of(ALIGNMENT_BYTES);
        Ok(Self { offsets: layout.offsets.into_iter().map(|o| o.unwrap_or_default()).collect(), bytes })
    }

    pub fn offset(&self, weight: WeightId) -> u64 {
        self.offsets[weight.0]
    }
}

struct Placing<'a> {
    program: &'a Program,
    offsets: Vec<Option<u64>>,
    bytes: u64,
}

impl Placing<'_> {
    fn run(&mut self, parts: &[WeightId]) -> Result<(), CudaError> {
        let mut at = self.bytes.next_multiple_of(ALIGNMENT_BYTES);
        for &part in parts {
            let weight = self.program.weight(part);
            if self.offsets[part.0].is_some() {
                let what = format!("{} as part of two products", weight.name);
                return Err(CudaError::Unsupported { op: "Linear", what });
            }
            self.offsets[part.0] = Some(at);
            at += weight.elements() * BF16_BYTES;
        }
        self.bytes = self.bytes.max(at);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::cuda::testing::{llama_program, llama_spec};

    #[test]
    fn parts_of_a_product_are_one_matrix_and_nothing_overlaps() {
        let mut spec = llama_spec(2);
        spec.layers.iter_mut().for_each(|l| l.attention_mut().unwrap().qkv_bias = true);
        let program = mserve_planner::model::families::program(&spec);
        let layout = WeightLayout::new(&program).unwrap();
        let bytes = |id: WeightId| program.weight(id).elements() * 2;
        for op in &program.ops {
            let Op::Linear { weights, .. } = op else { continue };
            for run in [&weights.parts, &weights.biases] {
                assert!(run.first().is_none_or(|&first| layout.offset(first).is_multiple_of(ALIGNMENT_BYTES)));
                for pair in run.windows(2) {
                    assert_eq!(layout.offset(pair[0]) + bytes(pair[0]), layout.offset(pair[1]));
                }
            }
        }
        let mut ranges: Vec<(u64, u64)> =
            (0..program.weights.len()).map(|i| (layout.offset(WeightId(i)), bytes(WeightId(i)))).collect();
        ranges.sort_unstable();
        assert!(ranges.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0), "{ranges:?}");
        assert!(ranges.last().is_some_and(|(at, len)| at + len <= layout.bytes));
    }

    #[test]
    fn the_allocation_is_what_the_parameters_take() {
        let program = llama_program(3);
        let layout = WeightLayout::new(&program).unwrap();
        let parameters = program.parameters() * 2;
        let most = parameters + program.weights.len() as u64 * ALIGNMENT_BYTES;
        assert!((parameters..most).contains(&layout.bytes), "{parameters} parameters, {} bytes", layout.bytes);
    }
}
