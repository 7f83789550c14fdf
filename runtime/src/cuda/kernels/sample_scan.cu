// The likeliest token of each part of each greedy row, into bests [rows, parts]: several blocks a row, so that a few rows use
// the whole card. sample.cu compares the parts. Logits, rows and lists as there; rows that are sampled, or want logprobs, are
// left to it.
// Grid: (parts, rows), 256 threads.
// Expected: bytes, rows * vocab * 4 at about 3.5 TB/s.

#define SCAN_THREADS 256
#define SCAN_LOADS 8  // under way a thread

// The likeliest of [begin, end) that this thread sees: four neighbours at a time, of which only the largest is compared.
// Ids rise within a thread, so that the first of equals stays. NaN is never larger.
DEVICE u64 scan_plain(const float* row, int begin, int end) {
  float best = minus_infinity();
  int best_at = begin + threadIdx.x * 4;
  for (int base = best_at; base < end; base += SCAN_THREADS * 4 * SCAN_LOADS) {
    float4 v[SCAN_LOADS];
#pragma unroll
    for (int i = 0; i < SCAN_LOADS; i++)
      if (base + i * SCAN_THREADS * 4 < end) v[i] = *(const float4*)(row + base + i * SCAN_THREADS * 4);
#pragma unroll
    for (int i = 0; i < SCAN_LOADS; i++) {
      const int at = base + i * SCAN_THREADS * 4;
      const float most = fmaxf(fmaxf(v[i].x, v[i].y), fmaxf(v[i].z, v[i].w));
      if (at < end && most > best) best = most, best_at = at;
    }
  }
  if (best_at >= end) return candidate(best, min(best_at, end - 1));
  const float4 v = *(const float4*)(row + best_at);
  const float four[4] = {v.x, v.y, v.z, v.w};
  int id = best_at;
#pragma unroll
  for (int i = 3; i >= 0; i--)
    if (four[i] == best) id = best_at + i;
  return candidate(tame(best), id);
}

KERNEL void __launch_bounds__(SCAN_THREADS)
sample_scan(const float* __restrict__ all_logits, const SampleRow* __restrict__ rows, const u16* token_state,
            const int* __restrict__ bias_tokens, const float* __restrict__ bias_values, u64* __restrict__ bests, int vocab,
            int row_stride, int state_stride) {
  __shared__ u64 shared_bests[SCAN_THREADS / 32];
  const int row = blockIdx.y, part = blockIdx.x;
  let_next_kernel_start();
  const SampleRow p = rows[row];  // not written by kernels
  wait_for_previous_kernels();
  if (!p.active || !is_greedy(p) || p.logprobs >= 0) return;
  const u16* state = p.state_slot >= 0 ? token_state + (u64)p.state_slot * state_stride : nullptr;
  const Logits logits = logits_of(p, all_logits, state, bias_tokens, bias_values, row, row_stride, vocab);
  const int length = ceil_div(ceil_div(vocab, 4), (int)gridDim.x) * 4, begin = part * length, end = min(vocab, begin + length);
  float best_x = minus_infinity();
  int best_id = min(begin + (int)threadIdx.x * 4, vocab - 1);
  const bool plain = state == nullptr && vocab % 4 == 0;  // no row ends within four neighbours
  for (int base = begin + threadIdx.x * 4; base < end && !plain; base += SCAN_THREADS * 4 * SCAN_LOADS) {
    float4 v[SCAN_LOADS];
#pragma unroll
    for (int i = 0; i < SCAN_LOADS; i++)
      if (base + i * SCAN_THREADS * 4 < end) v[i] = *(const float4*)(logits.row + base + i * SCAN_THREADS * 4);
#pragma unroll
    for (int i = 0; i < SCAN_LOADS; i++) {
      const int at = base + i * SCAN_THREADS * 4;
      if (at >= end) continue;
      // Ids rise within a thread, so that the first of equals stays.
      const auto keep = [&](int id, float, float x) { if (x > best_x) best_x = x, best_id = id; };
      logits.give4(v[i], at, keep);
    }
  }
  u64 best = plain ? scan_plain(logits.row, begin, end) : candidate(best_x, best_id);
#pragma unroll
  for (int o = 16; o; o >>= 1) {
    const u64 other = __shfl_xor_sync(FULL_WARP, best, o);
    best = other > best ? other : best;
  }
  if ((threadIdx.x & 31) == 0) shared_bests[threadIdx.x >> 5] = best;
  __syncthreads();
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int i = 1; i < SCAN_THREADS / 32; i++) best = shared_bests[i] > best ? shared_bests[i] : best;
  bests[(u64)row * gridDim.x + part] = best;
}
#undef SCAN_LOADS
#undef SCAN_THREADS
