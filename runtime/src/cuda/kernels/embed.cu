// out[t] = table[token_ids[t]] * scale
//
// token_ids [tokens] i32; an id < 0 names a token that the step before chose on the device: -1 - id is its row in
// `sampled`. table [vocab, width] bf16; out [tokens, width] bf16; width a multiple of 8. Ids outside the vocabulary
// give zeros. Grid: one block per token.
// Expected: bound by bytes, 2 * tokens * width * 2 at 4.36 TB/s; below 100 tokens by the launch (about 2 us).
KERNEL void embed(const int* __restrict__ token_ids, const int* __restrict__ sampled, const bf16* __restrict__ table,
                  bf16* __restrict__ out, int width, int vocab, float scale) {
  let_next_kernel_start();
  wait_for_previous_kernels();
  int id = token_ids[blockIdx.x];
  if (id < 0) id = sampled[-1 - id];
  const bool known = (u32)id < (u32)vocab;
  const u32x4* from = (const u32x4*)(table + (u64)(known ? id : 0) * width);
  u32x4* to = (u32x4*)(out + (u64)blockIdx.x * width);
  for (int i = threadIdx.x; i < width >> 3; i += blockDim.x) {
    u32x4 v = known ? from[i] : u32x4{{0, 0, 0, 0}};
    if (scale != 1.f) {
#pragma unroll
      for (int j = 0; j < 4; j++) v.r[j] = pack_bf16(low_bf16(v.r[j]) * scale, high_bf16(v.r[j]) * scale);
    }
    to[i] = v;
  }
}
