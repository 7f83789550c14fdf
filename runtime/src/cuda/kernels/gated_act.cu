// out = activation(gate) * up, rows of gate_up being [gate | up].
//
//   silu_mul: x / (1 + e^-x)     gelu_mul: exact, with erf     gelu_tanh_mul: the tanh form
//
// gate_up [rows, 2 * width] bf16, out [rows, width] bf16, width a multiple of 8. Arithmetic in f32.
// Grid: y = rows; x any number of blocks, which divide a row.
// Expected: bytes, rows * width * 6 at about 3.9 TB/s; below 100 rows by the launch, 2 us.

DEVICE float silu(float x) { return __fdividef(x, 1.f + exp2_fast(-x * LOG2E)); }  // 0 for a divisor beyond 2^126
DEVICE float gelu(float x) { return 0.5f * x * (1.f + erff(x * 0.70710678118654752f)); }
DEVICE float gelu_tanh(float x) { return 0.5f * x * (1.f + soft_cap(0.7978845608028654f * (x + 0.044715f * x * x * x), 1.f)); }

template <float (*ACT)(float)> DEVICE void gated(const bf16* gate_up, bf16* out, int width) {
  let_next_kernel_start();
  wait_for_previous_kernels();
  const int vectors = width >> 3, step = gridDim.x * blockDim.x;
  const u32x4* row = (const u32x4*)(gate_up + (u64)blockIdx.y * 2 * width);
  u32x4* to = (u32x4*)(out + (u64)blockIdx.y * width);
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < vectors; i += step) {
    const u32x4 gate = load_stream(row + i), up = load_stream(row + vectors + i);
    u32x4 o;
#pragma unroll
    for (int k = 0; k < 4; k++)
      o.r[k] = pack_bf16(ACT(low_bf16(gate.r[k])) * low_bf16(up.r[k]), ACT(high_bf16(gate.r[k])) * high_bf16(up.r[k]));
    to[i] = o;
  }
}

KERNEL void silu_mul(const bf16* gate_up, bf16* out, int width) { gated<silu>(gate_up, out, width); }
KERNEL void gelu_mul(const bf16* gate_up, bf16* out, int width) { gated<gelu>(gate_up, out, width); }
KERNEL void gelu_tanh_mul(const bf16* gate_up, bf16* out, int width) { gated<gelu_tanh>(gate_up, out, width); }
