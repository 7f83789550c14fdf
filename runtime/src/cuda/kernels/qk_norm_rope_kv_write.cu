// From packed rows [q heads | k heads | v heads] of the fused QKV product: normalise and rotate q in place, and write
// normalised, rotated K and plain V to the paged cache.
//
// qkv [tokens, (heads + 2 kv_heads) * HEAD_DIM] bf16. positions, slots [tokens] i32; slot = block * 16 + offset, -1
// writes nothing. Caches [blocks, kv_heads, 16, HEAD_DIM] bf16; null caches: K goes back in place instead (models that
// keep no cache). cos, sin [positions, rotary / 2] f32, with every scaling and attention factor already in them.
// q_weight, k_weight [HEAD_DIM] bf16 or null. Rotation pairs element i with i + rotary/2 (the layout of Hugging Face
// checkpoints); elements from `rotary` on pass through. rotary is a multiple of 4.
// Grid: 4 warps a block; a warp for four (token, head) jobs, for latency, or where that is more than the grid has, a warp
// for each token: cosines and sines are then read once for all its heads. Whole heads that rotate take eight lanes each
// (HEAD_DIM a multiple of 32), or of a token HEAD_DIM / 16 (a power of two), side by side; other shapes take the warp,
// one after the other.
// Expected: bytes, tokens * (2 (heads + kv_heads) + 2 kv_heads) * HEAD_DIM * 2 at about 3.5 TB/s; below 100 tokens 2 us.

#define WARPS 4
#define JOBS 4  // of a warp
#define PIECE (HEAD_DIM / 32)  // words that one of eight lanes has of each half of a head
#define WORDS (HEAD_DIM / 2)
#define WORDS_PER_LANE ((WORDS + 31) / 32)

struct Rope {
  bf16* qkv;
  const int *positions, *slots;
  const float *cos_table, *sin_table;
  const bf16 *q_weight, *k_weight;
  bf16 *key_cache, *value_cache;
  int tokens, heads, kv_heads, rotary;
  float eps, offset;
};

// One head of one token: where it is, where it goes.
struct Head {
  int token;
  bool is_query, is_value, skip;
  const u32* from;
  u32* to;
  const u32* weight;
  DEVICE Head(const Rope& r, int job) {
    const int all = r.heads + 2 * r.kv_heads;
    skip = job >= r.tokens * all;
    job = skip ? 0 : job;
    token = job / all;
    const int head = job - token * all;
    is_value = head >= r.heads + r.kv_heads, is_query = head < r.heads;
    from = (u32*)(r.qkv + (u64)token * all * HEAD_DIM) + head * WORDS;
    to = const_cast<u32*>(from);
    weight = (const u32*)(is_value ? nullptr : is_query ? r.q_weight : r.k_weight);
    if (is_query) return;
    if (r.key_cache == nullptr) {
      skip |= is_value;
      return;
    }
    const int slot = r.slots[token];
    skip |= slot < 0;
    const int kv_head = is_value ? head - r.heads - r.kv_heads : head - r.heads;
    const u64 at = (((u64)(max(slot, 0) >> 4) * r.kv_heads + kv_head) * 16 + (slot & 15)) * HEAD_DIM;
    to = (u32*)((is_value ? r.value_cache : r.key_cache) + at);
  }
};

DEVICE void load_piece(u32 (&to)[PIECE + (PIECE == 0)], const u32* from) {
  if (PIECE == 4) *(u32x4*)to = *(const u32x4*)from;
  else if (PIECE == 2) *(u32x2*)to = *(const u32x2*)from;
  else
#pragma unroll
    for (int i = 0; i < PIECE; i++) to[i] = from[i];
}
DEVICE void store_piece(u32* to, const u32 (&from)[PIECE + (PIECE == 0)]) {
  if (PIECE == 4) *(u32x4*)to = *(const u32x4*)from;
  else if (PIECE == 2) *(u32x2*)to = *(const u32x2*)from;
  else
#pragma unroll
    for (int i = 0; i < PIECE; i++) to[i] = from[i];
}

// The whole head rotates: eight lanes, each with the same piece of both halves.
DEVICE void eighth_of_head(const Rope& r, const Head& h, int part) {
  __align__(16) u32 first[PIECE + (PIECE == 0)];
  __align__(16) u32 second[PIECE + (PIECE == 0)];
  load_piece(first, h.from + part * PIECE);
  load_piece(second, h.from + WORDS / 2 + part * PIECE);
  float a[2 * PIECE + 1], b[2 * PIECE + 1], sum = 0.f;
#pragma unroll
  for (int i = 0; i < PIECE; i++) {
    a[2 * i] = low_bf16(first[i]), a[2 * i + 1] = high_bf16(first[i]);
    b[2 * i] = low_bf16(second[i]), b[2 * i + 1] = high_bf16(second[i]);
    sum += a[2 * i] * a[2 * i] + a[2 * i + 1] * a[2 * i + 1] + b[2 * i] * b[2 * i] + b[2 * i + 1] * b[2 * i + 1];
  }
  if (r.q_weight != nullptr) {  // the same for the whole launch: all lanes meet here
#pragma unroll
    for (int o = 4; o; o >>= 1) sum += __shfl_xor_sync(FULL_WARP, sum, o);
  }
  if (h.weight != nullptr) {
    const float factor = rsqrtf(sum / (float)HEAD_DIM + r.eps);
#pragma unroll
    for (int i = 0; i < PIECE; i++) {
      const u32 wa = h.weight[part * PIECE + i], wb = h.weight[WORDS / 2 + part * PIECE + i];
      a[2 * i] *= factor * (low_bf16(wa) + r.offset), a[2 * i + 1] *= factor * (high_bf16(wa) + r.offset);
      b[2 * i] *= factor * (low_bf16(wb) + r.offset), b[2 * i + 1] *= factor * (high_bf16(wb) + r.offset);
    }
  }
  if (h.skip) return;
  if (!h.is_value) {
    const float2* cosine = (const float2*)(r.cos_table + (u64)r.positions[h.token] * (HEAD_DIM / 2)) + part * PIECE;
    const float2* sine = (const float2*)(r.sin_table + (u64)r.positions[h.token] * (HEAD_DIM / 2)) + part * PIECE;
#pragma unroll
    for (int i = 0; i < PIECE; i++) {
      const float2 c = cosine[i], s = sine[i];
      first[i] = pack_bf16(a[2 * i] * c.x - b[2 * i] * s.x, a[2 * i + 1] * c.y - b[2 * i + 1] * s.y);
      second[i] = pack_bf16(b[2 * i] * c.x + a[2 * i] * s.x, b[2 * i + 1] * c.y + a[2 * i + 1] * s.y);
    }
  }
  store_piece(h.to + part * PIECE, first);
  store_piece(h.to + WORDS / 2 + part * PIECE, second);
}

#define BATCH 4                    // heads that a group of lanes has under way
#define TOKEN_LANES (HEAD_DIM / 16)  // of a head: 16 bytes of each half a lane
#define TOKEN_GROUPS (32 / TOKEN_LANES)
#define BY_TOKEN ((TOKEN_LANES & (TOKEN_LANES - 1)) == 0)

// All heads of a token, each of which rotates whole.
DEVICE void whole_token(const Rope& r, int token, int lane) {
  const int part = lane % TOKEN_LANES, group = lane / TOKEN_LANES, all = r.heads + 2 * r.kv_heads;
  u32x4* row = (u32x4*)(r.qkv + (u64)token * all * HEAD_DIM) + part;
  u32x4 first[BATCH], second[BATCH];
  float c[8], s[8];
  const int slot = r.key_cache == nullptr ? 0 : r.slots[token];
  const u64 place = ((u64)(max(slot, 0) >> 4) * r.kv_heads * 16 + (slot & 15)) * HEAD_DIM;
  const float* cosine = r.cos_table + (u64)r.positions[token] * (HEAD_DIM / 2) + part * 8;
  const float* sine = r.sin_table + (u64)r.positions[token] * (HEAD_DIM / 2) + part * 8;
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    const float4 a = *(const float4*)(cosine + i), b = *(const float4*)(sine + i);
    c[i] = a.x, c[i + 1] = a.y, c[i + 2] = a.z, c[i + 3] = a.w;
    s[i] = b.x, s[i + 1] = b.y, s[i + 2] = b.z, s[i + 3] = b.w;
  }
  for (int head0 = group; head0 < all + group; head0 += TOKEN_GROUPS * BATCH) {
#pragma unroll
    for (int j = 0; j < BATCH; j++) {
      const int head = head0 + j * TOKEN_GROUPS;
      if (head < all) first[j] = row[head * (HEAD_DIM / 8)], second[j] = row[head * (HEAD_DIM / 8) + HEAD_DIM / 16];
    }
#pragma unroll
    for (int j = 0; j < BATCH; j++) {
      const int head = head0 + j * TOKEN_GROUPS;
      const bool is_query = head < r.heads, is_value = head >= r.heads + r.kv_heads;
      float a[8], b[8], sum = 0.f;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        a[2 * i] = low_bf16(first[j].r[i]), a[2 * i + 1] = high_bf16(first[j].r[i]);
        b[2 * i] = low_bf16(second[j].r[i]), b[2 * i + 1] = high_bf16(second[j].r[i]);
      }
      if (r.q_weight != nullptr) {  // the same for the whole launch: all lanes meet here
#pragma unroll
        for (int i = 0; i < 8; i++) sum += a[i] * a[i] + b[i] * b[i];
#pragma unroll
        for (int o = TOKEN_LANES / 2; o; o >>= 1) sum += __shfl_xor_sync(FULL_WARP, sum, o);
        const float factor = rsqrtf(sum / (float)HEAD_DIM + r.eps);
        const bf16* weight = (is_query ? r.q_weight : r.k_weight) + part * 8;
#pragma unroll
        for (int i = 0; i < 8; i++) {
          a[i] *= is_value ? 1.f : factor * (to_float(weight[i]) + r.offset);
          b[i] *= is_value ? 1.f : factor * (to_float(weight[HEAD_DIM / 2 + i]) + r.offset);
        }
      }
      if (!is_value) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int x = 2 * i, y = x + 1;
          first[j].r[i] = pack_bf16(a[x] * c[x] - b[x] * s[x], a[y] * c[y] - b[y] * s[y]);
          second[j].r[i] = pack_bf16(b[x] * c[x] + a[x] * s[x], b[y] * c[y] + a[y] * s[y]);
        }
      }
      u32x4* to = row + head * (HEAD_DIM / 8);
      if (!is_query && r.key_cache != nullptr) {
        const int kv_head = is_value ? head - r.heads - r.kv_heads : head - r.heads;
        to = (u32x4*)((is_value ? r.value_cache : r.key_cache) + place + (u64)kv_head * 16 * HEAD_DIM) + part;
      }
      if (head < all && (is_query || (r.key_cache == nullptr ? !is_value : slot >= 0))) to[0] = first[j], to[HEAD_DIM / 16] = second[j];
    }
  }
}

// Any rotary part, the warp together.
DEVICE void whole_head(const Rope& r, const Head& h, int lane) {
  if (h.skip) return;
  const u32* row = h.from;
  u32* to = h.to;
  const int rotary = r.rotary;
  if (h.is_value) {
#pragma unroll
    for (int j = 0; j < WORDS_PER_LANE; j++)
      if (lane + 32 * j < WORDS) to[lane + 32 * j] = row[lane + 32 * j];
    return;
  }
  // Lane i holds words i (first half of the rotated part) and its partner; what does not rotate follows.
  const int pair_words = rotary >> 2;
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
  if (h.weight != nullptr) factor = rsqrtf(warp_sum(sum) / (float)HEAD_DIM + r.eps);
  const float* cos_row = r.cos_table + (u64)r.positions[h.token] * (rotary >> 1);
  const float* sin_row = r.sin_table + (u64)r.positions[h.token] * (rotary >> 1);
#pragma unroll
  for (int j = 0; j < WORDS_PER_LANE; j++) {
    const int i = lane + 32 * j;
    float a = low_bf16(first[j]), b = high_bf16(first[j]), c = low_bf16(second[j]), d = high_bf16(second[j]);
    float e = low_bf16(rest[j]), f = high_bf16(rest[j]);
    if (h.weight != nullptr) {
      const u32* w = h.weight;
      const u32 wa = i < pair_words ? w[i] : 0, wc = i < pair_words ? w[i + pair_words] : 0;
      const u32 we = i + 2 * pair_words < WORDS ? w[i + 2 * pair_words] : 0;
      a *= factor * (low_bf16(wa) + r.offset), b *= factor * (high_bf16(wa) + r.offset);
      c *= factor * (low_bf16(wc) + r.offset), d *= factor * (high_bf16(wc) + r.offset);
      e *= factor * (low_bf16(we) + r.offset), f *= factor * (high_bf16(we) + r.offset);
    }
    if (i < pair_words) {
      const float2 cosine = ((const float2*)cos_row)[i], sine = ((const float2*)sin_row)[i];
      to[i] = pack_bf16(a * cosine.x - c * sine.x, b * cosine.y - d * sine.y);
      to[i + pair_words] = pack_bf16(c * cosine.x + a * sine.x, d * cosine.y + b * sine.y);
    }
    if (i + 2 * pair_words < WORDS) to[i + 2 * pair_words] = pack_bf16(e, f);
  }
}

KERNEL void __launch_bounds__(WARPS * 32)
qk_norm_rope_kv_write(bf16* qkv, const int* positions, const int* slots, const float* cos_table, const float* sin_table,
                      const bf16* q_weight, const bf16* k_weight, bf16* key_cache, bf16* value_cache, int tokens,
                      int heads, int kv_heads, int rotary, float eps, float offset) {
  const int lane = threadIdx.x & 31, job0 = (blockIdx.x * WARPS + (threadIdx.x >> 5)) * JOBS;
  let_next_kernel_start();
  wait_for_previous_kernels();
  const Rope r = {qkv, positions, slots, cos_table, sin_table, q_weight, k_weight, key_cache, value_cache,
                  tokens, heads, kv_heads, rotary, eps, offset};
  if (gridDim.x * WARPS * JOBS < tokens * (heads + 2 * kv_heads)) {
    const int token = blockIdx.x * WARPS + (threadIdx.x >> 5), all = heads + 2 * kv_heads;
    if (token >= tokens) return;
    if (BY_TOKEN && rotary == HEAD_DIM) whole_token(r, token, lane);
    else
      for (int head = 0; head < all; head++) whole_head(r, Head(r, token * all + head), lane);
  } else if (PIECE > 0 && HEAD_DIM % 32 == 0 && rotary == HEAD_DIM) {
    eighth_of_head(r, Head(r, job0 + (lane >> 3)), lane & 7);
  } else {
    for (int j = 0; j < JOBS; j++) whole_head(r, Head(r, job0 + j), lane);
  }
}
#undef BATCH
#undef BY_TOKEN
#undef JOBS
#undef PIECE
#undef TOKEN_GROUPS
#undef TOKEN_LANES
#undef WARPS
#undef WORDS
#undef WORDS_PER_LANE
