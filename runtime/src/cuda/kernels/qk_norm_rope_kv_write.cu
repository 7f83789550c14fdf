// From packed rows [q heads | k heads | v heads] of the fused QKV product: normalise and rotate q in place, and write
// normalised, rotated K and plain V to the paged cache.
//
// qkv [tokens, (heads + 2 kv_heads) * HEAD_DIM] bf16. positions, slots [tokens] i32; slot = block * 16 + offset, -1
// writes nothing. Caches [blocks, kv_heads, 16, HEAD_DIM] bf16; null caches: K goes back in place instead (models that
// keep no cache). cos, sin [positions, rotary / 2] f32, with every scaling and attention factor already in them.
// q_weight, k_weight [HEAD_DIM] bf16 or null. Rotation pairs element i with i + rotary/2 (the layout of Hugging Face
// checkpoints); elements from `rotary` on pass through. rotary is a multiple of 4.
// Grid: one warp per (token, head), 8 warps a block.
// Expected: bytes, tokens * (2 (heads + kv_heads) + 2 kv_heads) * HEAD_DIM * 2 at about 3.5 TB/s; below 100 tokens 2 us.

#define WARPS 8
#define WORDS (HEAD_DIM / 2)
#define WORDS_PER_LANE ((WORDS + 31) / 32)

KERNEL void __launch_bounds__(WARPS * 32)
qk_norm_rope_kv_write(bf16* __restrict__ qkv, const int* __restrict__ positions, const int* __restrict__ slots,
                      const float* __restrict__ cos_table, const float* __restrict__ sin_table,
                      const bf16* __restrict__ q_weight, const bf16* __restrict__ k_weight,
                      bf16* __restrict__ key_cache, bf16* __restrict__ value_cache, int tokens, int heads, int kv_heads,
                      int rotary, float eps, float offset) {
  const int lane = threadIdx.x & 31, all = heads + 2 * kv_heads;
  const int job = blockIdx.x * WARPS + (threadIdx.x >> 5);
  let_next_kernel_start();
  wait_for_previous_kernels();
  if (job >= tokens * all) return;
  const int token = job / all, head = job - token * all;
  u32* row = (u32*)(qkv + (u64)token * all * HEAD_DIM) + head * WORDS;
  const bool is_value = head >= heads + kv_heads, is_query = head < heads;
  u32* to = row;
  if (!is_query && key_cache != nullptr) {
    const int slot = slots[token];
    if (slot < 0) return;
    const int kv_head = is_value ? head - heads - kv_heads : head - heads;
    const u64 at = (((u64)(slot >> 4) * kv_heads + kv_head) * 16 + (slot & 15)) * HEAD_DIM;
    to = (u32*)((is_value ? value_cache : key_cache) + at);
  }
  if (is_value) {
    if (to != row) {
#pragma unroll
      for (int j = 0; j < WORDS_PER_LANE; j++)
        if (lane + 32 * j < WORDS) to[lane + 32 * j] = row[lane + 32 * j];
    }
    return;
  }
  // Lane i holds words i (first half of the rotated part) and its partner; what does not rotate follows.
  const int pair_words = rotary >> 2;
  const bf16* weight = is_query ? q_weight : k_weight;
  u32 first[WORDS_PER_LANE], second[WORDS_PER_LANE], rest[WORDS_PER_LANE];
  float sum = 0.f;
#pragma unroll
  for (int j = 0; j < WORDS_PER_LANE; j++) {
    const int i = lane + 32 * j;
    first[j] = i < pair_words ? row[i] : 0;
    second[j] = i < pair_words ? row[i + pair_words] : 0;
    rest[j] = i + 2 * pair_words < WORDS ? row[i + 2 * pair_words] : 0;
    const float a = low_bf16(first[j]), b = high_bf16(first[j]), c = low_bf16(second[j]), d = high_bf16(second[j]);
    const float e = low_bf16(rest[j]), f = high_bf16(rest[j]);
    sum += a * a + b * b + c * c + d * d + e * e + f * f;
  }
  float factor = 1.f;
  if (weight != nullptr) factor = rsqrtf(warp_sum(sum) / (float)HEAD_DIM + eps);
  const float* cos_row = cos_table + (u64)positions[token] * (rotary >> 1);
  const float* sin_row = sin_table + (u64)positions[token] * (rotary >> 1);
#pragma unroll
  for (int j = 0; j < WORDS_PER_LANE; j++) {
    const int i = lane + 32 * j;
    float a = low_bf16(first[j]), b = high_bf16(first[j]), c = low_bf16(second[j]), d = high_bf16(second[j]);
    float e = low_bf16(rest[j]), f = high_bf16(rest[j]);
    if (weight != nullptr) {
      const u32* w = (const u32*)weight;
      const u32 wa = i < pair_words ? w[i] : 0, wc = i < pair_words ? w[i + pair_words] : 0;
      const u32 we = i + 2 * pair_words < WORDS ? w[i + 2 * pair_words] : 0;
      a *= factor * (low_bf16(wa) + offset), b *= factor * (high_bf16(wa) + offset);
      c *= factor * (low_bf16(wc) + offset), d *= factor * (high_bf16(wc) + offset);
      e *= factor * (low_bf16(we) + offset), f *= factor * (high_bf16(we) + offset);
    }
    if (i < pair_words) {
      const float2 cosine = ((const float2*)cos_row)[i], sine = ((const float2*)sin_row)[i];
      to[i] = pack_bf16(a * cosine.x - c * sine.x, b * cosine.y - d * sine.y);
      to[i + pair_words] = pack_bf16(c * cosine.x + a * sine.x, d * cosine.y + b * sine.y);
    }
    if (i + 2 * pair_words < WORDS) to[i + 2 * pair_words] = pack_bf16(e, f);
  }
}
#undef WARPS
#undef WORDS
#undef WORDS_PER_LANE
