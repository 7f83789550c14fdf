// Rows of x picked into out.
//
//   gather_rows:       out[i] = x[rows[i]]; rows[i] < 0 gives zeros
//   gather_last_rows:  out[s] = x[query_start[s + 1] - 1]; sequences without tokens give zeros
//
// x [*, width] bf16, out [grid, width] bf16, width a multiple of 8. Grid: one block per output row.
// Expected: the launch, about 2 us.

DEVICE void copy_row(const bf16* x, int row, bf16* out, int width) {
  const u32x4* from = (const u32x4*)(x + (u64)(row < 0 ? 0 : row) * width);
  u32x4* to = (u32x4*)(out + (u64)blockIdx.x * width);
  for (int i = threadIdx.x; i < width >> 3; i += blockDim.x) to[i] = row < 0 ? u32x4{{0, 0, 0, 0}} : from[i];
}

KERNEL void gather_rows(const bf16* x, const int* rows, bf16* out, int width) {
  let_next_kernel_start();
  wait_for_previous_kernels();
  copy_row(x, rows[blockIdx.x], out, width);
}
KERNEL void gather_last_rows(const bf16* x, const int* query_start, bf16* out, int width) {
  let_next_kernel_start();
  wait_for_previous_kernels();
  const int begin = query_start[blockIdx.x], end = query_start[blockIdx.x + 1];
  copy_row(x, end > begin ? end - 1 : -1, out, width);
}
