// Weights for speed measurements, made where they stay.
//
//   fill_uniform:   out[i] uniform in [-bound, bound), from (seed, i) alone
//   fill_constant:  out[i] = value
//
// out [n] bf16. Grid: any; the threads share the work. Expected: bytes, n * 2 at about 2 TB/s.

extern "C" __device__ unsigned short round_bf16(float v) {
  const unsigned int u = __float_as_uint(v);
  return (unsigned short)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
extern "C" __global__ void fill_uniform(unsigned short* out, unsigned long long n, float bound, unsigned long long seed) {
  const unsigned long long step = (unsigned long long)gridDim.x * blockDim.x;
  for (unsigned long long i = blockIdx.x * (unsigned long long)blockDim.x + threadIdx.x; i < n; i += step) {
    unsigned long long z = seed + (i + 1) * 0x9e3779b97f4a7c15ull;  // SplitMix64
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    z ^= z >> 31;
    out[i] = round_bf16(bound * ((float)(unsigned int)(z >> 40) * (1.f / 8388608.f) - 1.f));
  }
}
extern "C" __global__ void fill_constant(unsigned short* out, unsigned long long n, float value) {
  const unsigned long long step = (unsigned long long)gridDim.x * blockDim.x;
  const unsigned short bits = round_bf16(value);
  for (unsigned long long i = blockIdx.x * (unsigned long long)blockDim.x + threadIdx.x; i < n; i += step) out[i] = bits;
}
