//! Operands of products with the places that rotated heads go to.

use super::super::gemm::{GemmOperands, Rotation};
use super::super::memory::DevicePointer;
use super::super::plan::{LinearOp, RotatedOutput};
use super::{Surfaces, operands};

/// Positions and slots of a step's rows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RowPlaces {
    pub positions: DevicePointer,
    pub slots: DevicePointer,
}

impl Surfaces {
    /// Those of a product of a step with these rows.
    pub fn operands(&self, op: &LinearOp, rows: RowPlaces) -> GemmOperands {
        GemmOperands { rotation: op.rotated.map(|output| self.rotation(&output, rows)), ..operands(op) }
    }

    /// The same for a product that no step is of: rows at position 0 that have no place in the cache.
    pub fn trial_operands(&self, op: &LinearOp) -> GemmOperands {
        self.operands(op, self.no_places)
    }

    pub(super) fn rotation(&self, output: &RotatedOutput, rows: RowPlaces) -> Rotation {
        let (table, (keys, values)) = (self.ropes[output.rope], self.layers[output.layer]);
        Rotation {
            positions: rows.positions,
            slots: rows.slots,
            cos: table.cos,
            sin: table.sin,
            keys,
            values,
            heads: output.heads.heads,
            kv_heads: output.heads.kv_heads,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::RopeTable;
    use super::*;
    use crate::cuda::plan::HeadSizes;
    use mserve_planner::model::Rows;

    #[test]
    fn trials_write_to_no_cache() {
        let surfaces = Surfaces {
            no_places: RowPlaces { positions: 1, slots: 2 },
            ropes: vec![RopeTable::default(), RopeTable { cos: 3, sin: 4, rotary: 64 }],
            layers: vec![(5, 6), (7, 8)],
            ..Surfaces::default()
        };
        let heads = HeadSizes { heads: 14, kv_heads: 2, head_dim: 64 };
        let alone = LinearOp {
            rows: Rows::Tokens,
            x: 9,
            weight: 10,
            bias: Some(11),
            residual: None,
            out: 12,
            n: 1152,
            k: 896,
            f32_out: false,
            out_stride: 1152,
            gate_up: None,
            rotated: None,
        };
        assert_eq!(surfaces.trial_operands(&alone), operands(&alone));
        let rotated = LinearOp { rotated: Some(RotatedOutput { heads, rope: 1, layer: 1 }), ..alone };
        let Rotation { positions, slots, cos, sin, keys, values, heads, kv_heads } =
            surfaces.trial_operands(&rotated).rotation.unwrap();
        assert_eq!(([positions, slots, cos, sin, keys, values], [heads, kv_heads]), ([1, 2, 3, 4, 7, 8], [14, 2]));
    }
}
