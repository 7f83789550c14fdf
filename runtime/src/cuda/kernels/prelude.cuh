// Arithmetic shared by the kernels. Plain C++ over ptx.cuh; compiled as it stands by NVRTC and by the CPU emulation.

DEVICE float low_bf16(u32 v) { return __uint_as_float(v << 16); }
DEVICE float high_bf16(u32 v) { return __uint_as_float(v & 0xffff0000u); }
DEVICE float to_float(bf16 v) { return __uint_as_float((u32)v << 16); }
DEVICE bf16 to_bf16(float v) { return (bf16)(pack_bf16(v, 0.f) & 0xffffu); }
DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }
DEVICE float minus_infinity() { return __uint_as_float(0xff800000u); }

#define LOG2E 1.4426950408889634f

DEVICE float warp_sum(float v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(FULL_WARP, v, o);
  return v;
}
DEVICE float warp_max(float v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v = fmaxf(v, __shfl_xor_sync(FULL_WARP, v, o));
  return v;
}
// Sum over the block, the same in every thread. `scratch` holds one float per warp and is free again afterwards.
DEVICE float block_sum(float v, float* scratch) {
  v = warp_sum(v);
  if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = v;
  __syncthreads();
  const int warps = (blockDim.x + 31) >> 5, lane = threadIdx.x & 31;
  const float total = warp_sum(lane < warps ? scratch[lane] : 0.f);
  __syncthreads();
  return total;
}
// cap * tanh(x / cap); exact limits for large |x|.
DEVICE float soft_cap(float x, float cap) { return cap * (1.f - __fdividef(2.f, 1.f + exp2_fast(x * (2.f * LOG2E / cap)))); }
// silu of both gates, times the ups, packed: x sigmoid(x) = h + h tanh(h) with h = x / 2, one special function for each. The
// tangent is good to 2^-11 of one, a quarter of what rounding the result to bf16 takes at x = 1.
DEVICE u32 gate_pair(const float* gate, const float* up) {
  const float a = 0.5f * gate[0], b = 0.5f * gate[1], au = a * up[0], bu = b * up[1];
  return pack_bf16(au + au * tanh_fast(a), bu + bu * tanh_fast(b));
}
