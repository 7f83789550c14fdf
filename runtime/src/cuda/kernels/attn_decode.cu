// Paged decode attention: one query a sequence, split over the context (flash decoding), heads of a group together.
//
// q: rows of packed QKV, row b at q + b * q_stride, already rotated; sequence b is row b. Caches [blocks, kv_heads, 16,
// HEAD_DIM] bf16. block_table [sequences, max_blocks] i32, context_len [sequences] i32 (0: a padding row, gives zeros).
// out [sequences, heads * HEAD_DIM] bf16. window 0: whole context. softcap 0: none. scale: on q k.
// Scratch for splits > 1: partial f32 [sequences, heads, splits, HEAD_DIM], statistic float2 [sequences, heads, splits].
// `splits` is the most that the graph allows; a sequence uses fewer when its context is short (used_splits), and with one
// the decode kernel writes `out` itself and attn_combine has nothing to do.
// (Combining in the block that ends last, by a ticket, was 2-4 us slower a layer on an H200 than the second launch.)
// Grid of attn_decode: (splits, kv_heads * ceil(group / 8), sequences), 128 threads. Of attn_combine: (heads, sequences).
//
// K and V go from global memory straight into mma fragments: a dot product does not mind a permuted index, so each lane
// loads 16 consecutive bytes and the fragments' k index is permuted alike in both operands. No shared memory on the way.
// Expected: bytes of K and V, sequences * context * kv_heads * HEAD_DIM * 4 at 4.36 TB/s; 4.1 from 32 sequences of 1,024.

#define WARPS 4
#define QUERY_WORDS (HEAD_DIM / 32)        // 16-byte pieces of a row per lane
#define QUERY_TAIL (HEAD_DIM % 32 == 16)   // and one of 8 bytes
#define VALUE_WORDS (HEAD_DIM / 64)
#define VALUE_TAIL ((HEAD_DIM % 64) / 8)   // elements a lane takes of what 64 does not divide: 0, 2 or 4
#define AT_LEAST_ONE(n) ((n) > 0 ? (n) : 1)  // arrays of a head_dim that has none
#define TILE_MIN_PER_SPLIT (2 * WARPS)
#define MASKED -1e30f

DEVICE int used_splits(int tiles, int splits) { return max(1, min(splits, ceil_div(tiles, TILE_MIN_PER_SPLIT))); }
DEVICE int first_tile(int length, int window) { return window > 0 ? max(0, length - window) >> 4 : 0; }

KERNEL void __launch_bounds__(WARPS * 32)
attn_decode(const bf16* __restrict__ q, int q_stride, const bf16* __restrict__ key_cache,
            const bf16* __restrict__ value_cache, const int* __restrict__ block_table,
            const int* __restrict__ context_len, bf16* __restrict__ out, float* __restrict__ partial,
            float2* __restrict__ statistic, int max_blocks, int heads, int kv_heads, float scale, float softcap, int window) {
  const int split = blockIdx.x, splits = gridDim.x, b = blockIdx.z;
  const int whole_group = heads / kv_heads, passes = ceil_div(whole_group, 8);
  const int h = blockIdx.y / passes, pass = blockIdx.y - h * passes;
  const int group = min(8, whole_group - pass * 8), head0 = h * whole_group + pass * 8;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, row = lane >> 2, c4 = lane & 3;
  let_next_kernel_start();
  wait_for_previous_kernels();
  const int length = context_len[b];
  if (length <= 0) {
    if (split == 0)
      for (int i = threadIdx.x; i < group * HEAD_DIM; i += WARPS * 32) out[((u64)b * heads + head0) * HEAD_DIM + i] = 0;
    return;
  }
  const int begin = window > 0 ? max(0, length - window) : 0, tile0 = first_tile(length, window), tiles = (length + 15) >> 4;
  const int used = used_splits(tiles - tile0, splits), per = ceil_div(tiles - tile0, used);
  if (split >= used) return;
  const int t0 = tile0 + split * per, t1 = min(tiles, t0 + per);

  const bf16* query = q + (u64)b * q_stride + (u64)(head0 + row) * HEAD_DIM;
  u32x4 qa[AT_LEAST_ONE(QUERY_WORDS)];
  u32x2 qt = {{0, 0}};
#pragma unroll
  for (int j = 0; j < QUERY_WORDS; j++) qa[j] = row < group ? load_stream(query + c4 * 8 + 32 * j) : u32x4{{0, 0, 0, 0}};
  if (QUERY_TAIL && row < group) qt = load_stream8(query + 32 * QUERY_WORDS + c4 * 4);

  float o[AT_LEAST_ONE(VALUE_WORDS)][8][2], ot[AT_LEAST_ONE(VALUE_TAIL)][2];
#pragma unroll
  for (int x = 0; x < VALUE_WORDS; x++)
#pragma unroll
    for (int i = 0; i < 8; i++) o[x][i][0] = o[x][i][1] = 0.f;
#pragma unroll
  for (int i = 0; i < VALUE_TAIL; i++) ot[i][0] = ot[i][1] = 0.f;

  float m = MASKED, l = 0.f;
  int blocks = 0;
  for (int it = 0, t = t0 + warp; t < t1; t += WARPS, it++) {
    if ((it & 31) == 0) {  // the warp's next 32 block numbers, one a lane
      const int tt = t + WARPS * lane;
      blocks = tt < t1 ? block_table[(u64)b * max_blocks + tt] : 0;
    }
    const u64 base = ((u64)__shfl_sync(FULL_WARP, blocks, it & 31) * kv_heads + h) * (16 * HEAD_DIM);
    u32x4 k[2][AT_LEAST_ONE(QUERY_WORDS)], v[AT_LEAST_ONE(VALUE_WORDS)][4];
    u32x2 kt[2], vt[4];
#pragma unroll
    for (int n = 0; n < 2; n++) {
      const bf16* from = key_cache + base + (n * 8 + row) * HEAD_DIM;
#pragma unroll
      for (int j = 0; j < QUERY_WORDS; j++) k[n][j] = load_stream(from + c4 * 8 + 32 * j);
      if (QUERY_TAIL) kt[n] = load_stream8(from + 32 * QUERY_WORDS + c4 * 4);
    }
#pragma unroll
    for (int y = 0; y < 4; y++) {
      const bf16* from = value_cache + base + (c4 * 2 + (y & 1) + (y >> 1) * 8) * HEAD_DIM;
#pragma unroll
      for (int x = 0; x < VALUE_WORDS; x++) v[x][y] = load_stream(from + row * 8 + 64 * x);
      if (VALUE_TAIL == 4) vt[y] = load_stream8(from + 64 * VALUE_WORDS + row * 4);
      if (VALUE_TAIL == 2) vt[y].r[0] = load_stream4(from + 64 * VALUE_WORDS + row * 2);
    }
    float c[2][2] = {{0.f, 0.f}, {0.f, 0.f}};
#pragma unroll
    for (int n = 0; n < 2; n++) {
#pragma unroll
      for (int j = 0; j < QUERY_WORDS; j++) {
        mma_bf16_top(c[n], qa[j].r[0], qa[j].r[1], k[n][j].r[0], k[n][j].r[1]);
        mma_bf16_top(c[n], qa[j].r[2], qa[j].r[3], k[n][j].r[2], k[n][j].r[3]);
      }
      if (QUERY_TAIL) mma_bf16_top(c[n], qt.r[0], qt.r[1], kt[n].r[0], kt[n].r[1]);
    }
    float mx = m;
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int at = t * 16 + n * 8 + c4 * 2 + e;
        float s = c[n][e] * scale;
        if (softcap > 0.f) s = soft_cap(s, softcap);
        c[n][e] = at < length && at >= begin ? s * LOG2E : MASKED;
        mx = fmaxf(mx, c[n][e]);
      }
    mx = fmaxf(mx, __shfl_xor_sync(FULL_WARP, mx, 1));
    mx = fmaxf(mx, __shfl_xor_sync(FULL_WARP, mx, 2));
    const float alpha = exp2_fast(m - mx);
    m = mx;
    float p = 0.f;
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        c[n][e] = exp2_fast(c[n][e] - mx);
        p += c[n][e];
      }
    l = l * alpha + p;
    const u32 a0 = pack_bf16(c[0][0], c[0][1]), a2 = pack_bf16(c[1][0], c[1][1]);
    // Rows past the end are zero in p but may hold anything in the cache: keep 0 * NaN out.
    if (t * 16 + 16 > length) {
#pragma unroll
      for (int y = 0; y < 4; y++)
        if (t * 16 + c4 * 2 + (y & 1) + (y >> 1) * 8 >= length) {
#pragma unroll
          for (int x = 0; x < VALUE_WORDS; x++) v[x][y] = u32x4{{0, 0, 0, 0}};
          vt[y] = u32x2{{0, 0}};
        }
    }
#pragma unroll
    for (int x = 0; x < VALUE_WORDS; x++)
#pragma unroll
      for (int i = 0; i < 8; i++) {
        o[x][i][0] *= alpha, o[x][i][1] *= alpha;
        const u32 half = (i & 1) ? 0x7632 : 0x5410;
        mma_bf16_top(o[x][i], a0, a2, __byte_perm(v[x][0].r[i >> 1], v[x][1].r[i >> 1], half),
                     __byte_perm(v[x][2].r[i >> 1], v[x][3].r[i >> 1], half));
      }
#pragma unroll
    for (int i = 0; i < VALUE_TAIL; i++) {
      ot[i][0] *= alpha, ot[i][1] *= alpha;
      const u32 half = (i & 1) ? 0x7632 : 0x5410;
      mma_bf16_top(ot[i], a0, a2, __byte_perm(vt[0].r[i >> 1], vt[1].r[i >> 1], half),
                   __byte_perm(vt[2].r[i >> 1], vt[3].r[i >> 1], half));
    }
  }
  l += __shfl_xor_sync(FULL_WARP, l, 1);
  l += __shfl_xor_sync(FULL_WARP, l, 2);

  // Put the warps' shares together.
  __shared__ float so[WARPS][8][HEAD_DIM + 4];
  __shared__ float sm[WARPS][8], sl[WARPS][8];
#pragma unroll
  for (int e = 0; e < 2; e++) {
#pragma unroll
    for (int x = 0; x < VALUE_WORDS; x++)
#pragma unroll
      for (int i = 0; i < 8; i++) so[warp][row][64 * x + (c4 * 2 + e) * 8 + i] = o[x][i][e];
#pragma unroll
    for (int i = 0; i < VALUE_TAIL; i++) so[warp][row][64 * VALUE_WORDS + (c4 * 2 + e) * VALUE_TAIL + i] = ot[i][e];
  }
  if (c4 == 0) sm[warp][row] = m, sl[warp][row] = l;
  __syncthreads();
  for (int i = threadIdx.x; i < group * HEAD_DIM; i += WARPS * 32) {
    const int r = i / HEAD_DIM, d = i - r * HEAD_DIM;
    float most = MASKED, weight = 0.f, value = 0.f;
#pragma unroll
    for (int x = 0; x < WARPS; x++) most = fmaxf(most, sm[x][r]);
#pragma unroll
    for (int x = 0; x < WARPS; x++) {
      const float f = exp2_fast(sm[x][r] - most);
      weight += sl[x][r] * f, value += so[x][r][d] * f;
    }
    const u64 head = (u64)b * heads + head0 + r;
    if (used == 1) {
      out[head * HEAD_DIM + d] = to_bf16(value / weight);
    } else {
      partial[(head * splits + split) * HEAD_DIM + d] = value;
      if (d == 0) statistic[head * splits + split] = make_float2(most, weight);
    }
  }
}

// One query head out of its splits; each thread has an element.
DEVICE void combine_head(u64 head, const float* partial, const float2* statistic, bf16* out, int splits, int used) {
  const int d = threadIdx.x;
  if (d >= HEAD_DIM) return;
  float most = MASKED, weight = 0.f, value = 0.f;
  for (int s = 0; s < used; s++) most = fmaxf(most, statistic[head * splits + s].x);
  for (int s = 0; s < used; s++) {
    const float2 v = statistic[head * splits + s];
    const float f = exp2_fast(v.x - most);
    weight += v.y * f, value += partial[(head * splits + s) * HEAD_DIM + d] * f;
  }
  out[head * HEAD_DIM + d] = to_bf16(value / weight);
}

KERNEL void __launch_bounds__(128)
attn_combine(const float* partial, const float2* statistic, const int* context_len, bf16* out, int splits, int window) {
  let_next_kernel_start();
  wait_for_previous_kernels();
  const int length = context_len[blockIdx.y];
  const int used = used_splits(((length + 15) >> 4) - first_tile(length, window), splits);
  if (length <= 0 || used == 1) return;
  combine_head((u64)blockIdx.y * gridDim.x + blockIdx.x, partial, statistic, out, splits, used);
}

#undef WARPS
#undef QUERY_WORDS
#undef QUERY_TAIL
#undef VALUE_WORDS
#undef VALUE_TAIL
#undef TILE_MIN_PER_SPLIT
#undef MASKED
#undef AT_LEAST_ONE
