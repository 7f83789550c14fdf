// Root mean square norms over rows of bf16, arithmetic in f32.
//
//   rms_norm:      y = x / rms(x) * (weight + offset)          offset is 1 for Gemma, else 0
//   rms_norm_add:  y = that + add                              a norm behind a block, residual behind it
//   add_rms_norm:  residual += x; y = rms_norm(residual)       residual in place, rounded to bf16 before the norm
//
// x, y, add, residual [rows, width]; weight [width]; width a multiple of 8, at most 8 * 4 * blockDim.x, so that a row
// stays in registers. Grid: one block per row, or fewer, one warp per row: for many short rows, width at most 1,024.
// Expected: bound by bytes, rows * width * 4 (8 for add_rms_norm) at 3.9 TB/s; below 100 rows by latency, 2-3 us.

#define ROW_VECTORS 4

template <bool ADD_BEFORE, bool ADD_AFTER, bool BY_WARP>
DEVICE void norm_row(const bf16* x, bf16* residual, const bf16* add, const bf16* weight, bf16* y, int rows, int width,
                     float eps, float offset) {
  __shared__ float scratch[32];
  const int threads = BY_WARP ? 32 : blockDim.x, thread = BY_WARP ? threadIdx.x & 31 : threadIdx.x;
  const int which = BY_WARP ? blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5) : blockIdx.x;
  const u64 base = (u64)which * width;
  const int vectors = width >> 3;
  if (BY_WARP && which >= rows) return;
  u32x4 row[ROW_VECTORS];
  float sum = 0.f;
#pragma unroll
  for (int j = 0; j < ROW_VECTORS; j++) {
    const int i = thread + j * threads;
    if (i < vectors) {
      row[j] = ((const u32x4*)(x + base))[i];
      if (ADD_BEFORE) {
        u32x4* at = (u32x4*)(residual + base) + i;
        const u32x4 r = *at;
#pragma unroll
        for (int k = 0; k < 4; k++)
          row[j].r[k] = pack_bf16(low_bf16(row[j].r[k]) + low_bf16(r.r[k]), high_bf16(row[j].r[k]) + high_bf16(r.r[k]));
        *at = row[j];
      }
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const float low = low_bf16(row[j].r[k]), high = high_bf16(row[j].r[k]);
        sum += low * low + high * high;
      }
    }
  }
  const float factor = rsqrtf((BY_WARP ? warp_sum(sum) : block_sum(sum, scratch)) / (float)width + eps);
#pragma unroll
  for (int j = 0; j < ROW_VECTORS; j++) {
    const int i = thread + j * threads;
    if (i < vectors) {
      const u32x4 w = ((const u32x4*)weight)[i];
      u32x4 a = {{0, 0, 0, 0}};
      if (ADD_AFTER) a = ((const u32x4*)(add + base))[i];
      u32x4 o;
#pragma unroll
      for (int k = 0; k < 4; k++)
        o.r[k] = pack_bf16(low_bf16(row[j].r[k]) * factor * (low_bf16(w.r[k]) + offset) + low_bf16(a.r[k]),
                           high_bf16(row[j].r[k]) * factor * (high_bf16(w.r[k]) + offset) + high_bf16(a.r[k]));
      ((u32x4*)(y + base))[i] = o;
    }
  }
}

template <bool ADD_BEFORE, bool ADD_AFTER>
DEVICE void norm(const bf16* x, bf16* residual, const bf16* add, const bf16* weight, bf16* y, int rows, int width, float eps,
                 float offset) {
  let_next_kernel_start();
  wait_for_previous_kernels();
  if (gridDim.x == rows) norm_row<ADD_BEFORE, ADD_AFTER, false>(x, residual, add, weight, y, rows, width, eps, offset);
  else norm_row<ADD_BEFORE, ADD_AFTER, true>(x, residual, add, weight, y, rows, width, eps, offset);
}

KERNEL void __launch_bounds__(1024) rms_norm(const bf16* x, const bf16* weight, bf16* y, int rows, int width, float eps,
                                             float offset) {
  norm<false, false>(x, nullptr, nullptr, weight, y, rows, width, eps, offset);
}
KERNEL void __launch_bounds__(1024) rms_norm_add(const bf16* x, const bf16* weight, const bf16* add, bf16* y, int rows,
                                                 int width, float eps, float offset) {
  norm<false, true>(x, nullptr, add, weight, y, rows, width, eps, offset);
}
KERNEL void __launch_bounds__(1024) add_rms_norm(const bf16* x, bf16* residual, const bf16* weight, bf16* y, int rows,
                                                 int width, float eps, float offset) {
  norm<true, false>(x, residual, nullptr, weight, y, rows, width, eps, offset);
}
