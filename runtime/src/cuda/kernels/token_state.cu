// What a sequence's sampling must remember of each token of the vocabulary, 16 bits a token: bit 15, it stands in the
// prompt; bit 14, it is in the row's bias list; bits 0..13, times generated (saturating). sample.cu keeps the count.
//
// token_state_reset: one slot from scratch. state [state_stride] u16, state_stride even and at least vocab; three lists of
// token ids, any of them empty; ids outside the vocabulary are passed over. Grid: one block of 1,024 threads.
// Expected: bytes, 2 * vocab written once, about 4 us; only when a request with penalties or a bias starts or resumes.

#define STATE_COUNT 0x3fffu

// The half word of `id` through `change`; neighbours change at the same time.
template <class F> DEVICE void change_state(u16* state, int id, F change) {
  u32* word = (u32*)state + (id >> 1);
  const int shift = (id & 1) * 16;
  u32 seen = *(volatile u32*)word;
  for (;;) {
    const u32 half = (seen >> shift) & 0xffffu, want = (seen & ~(0xffffu << shift)) | (change(half) << shift);
    const u32 was = atomicCAS(word, seen, want);
    if (was == seen) return;
    seen = was;
  }
}

KERNEL void __launch_bounds__(1024)
token_state_reset(u16* state, int vocab, int state_stride, const int* prompt, int prompt_count, const int* output,
                  int output_count, const int* listed, int listed_count) {
  let_next_kernel_start();
  wait_for_previous_kernels();
  for (int i = threadIdx.x; i < state_stride >> 1; i += blockDim.x) ((u32*)state)[i] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < prompt_count; i += blockDim.x)
    if ((u32)prompt[i] < (u32)vocab) change_state(state, prompt[i], [](u32 h) { return h | 0x8000u; });
  for (int i = threadIdx.x; i < listed_count; i += blockDim.x)
    if ((u32)listed[i] < (u32)vocab) change_state(state, listed[i], [](u32 h) { return h | 0x4000u; });
  for (int i = threadIdx.x; i < output_count; i += blockDim.x)
    if ((u32)output[i] < (u32)vocab)
      change_state(state, output[i], [](u32 h) { return (h & STATE_COUNT) < STATE_COUNT ? h + 1 : h; });
}
#undef STATE_COUNT
