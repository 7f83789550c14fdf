//! The launch of `chain_linear.cu`.

use super::{Executor, Step};
use crate::cuda::CudaError;
use crate::cuda::kernels;
use crate::cuda::module::Arg;
use crate::cuda::plan::ChainOp;
use crate::cuda::tensor_map::matrix_map;

impl Executor {
    /// # Safety
    /// As [`Self::run`].
    pub(super) unsafe fn chain(&self, op: &ChainOp, step: &Step<'_>) -> Result<(), CudaError> {
        let Some(kernel) = &self.kernels.chain else {
            return Err(CudaError::Unsupported { op: "Linear", what: "chained products on this card".to_owned() });
        };
        let (s, sizes, rows) = (&self.surfaces, op.sizes, step.shape.tokens as u64);
        let [hidden, attention, inner] = [sizes.hidden, sizes.attention, sizes.inner].map(u64::from);
        let map =
            |base, rows, columns, box_rows| matrix_map(&self.device, base, [rows, columns], box_rows).map(Arg::Map);
        let x = |base, columns| map(base, rows, columns, kernels::CHAIN_ROWS);
        let [o_box, gate_up_box, down_box, qkv_box] = kernels::CHAIN_BOX_ROWS;
        let next = op.next.as_ref();
        let rotation = next.map(|n| s.rotation(&n.rotated, step.places())).unwrap_or_default();
        let head_dim = next.map_or(0, |n| n.rotated.heads.head_dim);
        let norm = next.map_or(op.mlp_norm, |n| n.norm);
        let qkv = next.map_or(0, |n| n.n);
        // Without a next layer the map is not used, but must be one.
        let no_next = (hidden, attention, op.o);
        let (qkv_rows, qkv_columns, qkv_weight) = next.map_or(no_next, |n| (u64::from(n.n), hidden, n.weight));
        let mut args = vec![
            x(op.x, attention)?,
            map(op.o, hidden, attention, o_box)?,
            x(s.chain.normed, hidden)?,
            map(op.gate_up, 2 * inner, hidden, gate_up_box)?,
            x(op.inner, inner)?,
            map(op.down, hidden, inner, down_box)?,
            map(qkv_weight, qkv_rows, qkv_columns, qkv_box)?,
            Arg::Pointer(op.residual),
            Arg::Pointer(op.h),
            Arg::Pointer(s.chain.normed),
            Arg::Pointer(s.chain.squares),
            Arg::Pointer(op.inner),
            Arg::Pointer(s.chain.count),
            Arg::Pointer(op.mlp_norm.weight),
            Arg::Pointer(norm.weight),
            Arg::Pointer(next.and_then(|n| n.bias).unwrap_or(0)),
            Arg::Pointer(next.map_or(0, |n| n.out)),
        ];
        args.extend(rotation.places());
        let widths = [sizes.hidden, sizes.attention, sizes.inner, qkv];
        let heads = [rotation.heads, rotation.kv_heads, head_dim];
        args.extend([rows as u32].into_iter().chain(widths).chain(heads).map(|size| Arg::Int(size as i32)));
        args.extend([op.mlp_norm.eps, norm.eps].map(Arg::Float));
        // SAFETY: passed on from the caller: the operands are buffers of the plan, at least as large as the step, scratch is
        // as large as the most rows that the list of ops is for; the kernel takes these sizes (`kernels::chain_for`).
        unsafe { kernel.launch(&sizes, &args) }
    }
}
