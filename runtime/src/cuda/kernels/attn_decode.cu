// Paged decode attention: one query a sequence, heads of a group together, contexts divided (flash decoding).
//
// q: rows of packed QKV, row b at q + b * q_stride, already rotated; sequence b is row b. Caches [blocks, kv_heads, 16,
// HEAD_DIM] bf16. block_table [sequences, max_blocks] i32, context_len [sequences] i32 (0: a padding row, gives zeros).
// out [sequences, heads * HEAD_DIM] bf16. window 0: whole context. softcap 0: none. scale: on q k.
//
//   attn_decode_w{W}: W warps a block, each with a ring of STAGES tiles (16 tokens of K and V) in shared memory.
//
// `clusters` clusters of C blocks (C 1, 2, 4 or 8, along y; 1 below sm_90) divide a context, tile by tile in turn; a short
// one is left to fewer of them. Blocks of a cluster put their shares together in shared memory; several clusters meet
// through `partial` f32 [sequences, heads, clusters, HEAD_DIM] and `statistic` float2 [sequences, heads, clusters], and the
// one that ends last writes `out`; then sequences * kv_heads * ceil(group / 8) * C is at most TICKETS.
// Grid: (clusters * kv_heads * ceil(group / 8), C, sequences), 32 W threads. Dynamic shared memory: Ring<W>::BYTES.
//
// What keeps 16-byte reads of a tile free of bank conflicts:
// - K: where rows are whole 128 bytes, odd ones have the two halves of each 128 bytes exchanged.
// - V: 32 bytes between four tokens and the next four, and the four lanes of a row read from four such groups.
// Expected: bytes of K and V, sequences * context * kv_heads * HEAD_DIM * 4 at 4.36 TB/s. Measured on an H200 (2026-11-28),
// us of one launch between two other kernels, bound in brackets:
//   sequences x context     32 heads of 128, 8 of KV              14 heads of 64, 2 of KV
//     1 x 1,024             4.3 [1.0]     w4, clusters of 4       3.2 [0.1]     w8, clusters of 8
//     8 x 1,024            12.2 [7.7]     w4, cluster of 2        3.8 [1.0]     w8, cluster of 4
//    64 x 1,024            66.4 [61.6]    w8                     11.1 [7.7]     w8, cluster of 2
//   128 x 1,024           125.6 [123.1]   w4                     17.9 [15.4]    w8
//   256 x 1,024           247.8 [246.3]   w4                     32.8 [30.8]    w4
//     1 x 32,768           39   [30.8]    w4, clusters of 4      10.1 [3.8]     w8, clusters of 8
//    64 x 128..1,920       65.5 [60.8]    w8                     11.3 [7.6]     w8, cluster of 2
//   256 x 128..1,920      246.4 [239.4]   w4                     37.2 [29.9]    w4
// With 8 warps of 128 up to 16 sequences would be a tenth faster, but the products beside them then lose more: see
// Kernel::beside_l1 in module.rs.

#define MASKED -1e30f
#define TILES_A_WARP 4  // before one more cluster is worth its meeting
#define TICKETS 2048

DEVICE_COUNTER tickets[TICKETS];  // zero between launches

template <int WARPS> struct Ring {
  static constexpr int ROW = 2 * HEAD_DIM, KEYS = 16 * ROW, GROUP = 4 * ROW, GROUP_STRIDE = GROUP + 32;  // bytes
  static constexpr int OF_WARP = STAGES * (KEYS + 4 * GROUP_STRIDE);
  static constexpr int PARTS_AT = WARPS * OF_WARP;  // [C][8 * HEAD_DIM / C] f32, from all blocks of the cluster
  static constexpr int STATISTICS_AT = PARTS_AT + 32 * HEAD_DIM;  // [8 blocks][8 heads] (most, weight)
  static constexpr int LAST_AT = STATISTICS_AT + 512;
  static constexpr int BYTES = LAST_AT + 16;
};

// Sums that belong to different greatest scores, put together.
struct Sum {
  float most = MASKED, weight = 0.f;
  float4 value = {0.f, 0.f, 0.f, 0.f};
  DEVICE void add(float factor, float w, const float4& v) {
    weight += w * factor;
    value.x += v.x * factor, value.y += v.y * factor, value.z += v.z * factor, value.w += v.w * factor;
  }
  DEVICE void store(bf16* out) const {
    const float f = 1.f / weight;
    *(u32x2*)out = {{pack_bf16(value.x * f, value.y * f), pack_bf16(value.z * f, value.w * f)}};
  }
};

template <int WARPS> DEVICE void
decode(const bf16* __restrict__ q, int q_stride, const bf16* __restrict__ key_cache, const bf16* __restrict__ value_cache,
       const int* __restrict__ block_table, const int* __restrict__ context_len, bf16* __restrict__ out,
       float* __restrict__ partial, float2* __restrict__ statistic, int max_blocks, int heads, int kv_heads, float scale,
       float softcap, int window) {
  using R = Ring<WARPS>;
  constexpr int STAGE = R::OF_WARP / STAGES, THREADS = WARPS * 32;
  constexpr int PIECES = HEAD_DIM / 32, WIDE = HEAD_DIM / 64;  // 16-byte reads of a row of K and of V by a lane
  constexpr bool KEY_TAIL = HEAD_DIM % 32 == 16;               // and 8 bytes of K
  constexpr int WORDS = HEAD_DIM / 16, VALUE_TAIL = WORDS - 4 * WIDE;  // a lane's words of a row of V; 0, 1 or 2 at its end
  constexpr int ODD = HEAD_DIM % 64 == 0 ? 1 : 0;  // halves exchanged in odd rows of K
  constexpr int SUMS = HEAD_DIM + 4, QUADS = HEAD_DIM / 4;  // what warps leave: [8][SUMS], then most [8], weight [8]
  static_assert((8 * SUMS + 16) * 4 <= R::OF_WARP);
  DYNAMIC_SHARED(base);
  const int whole_group = heads / kv_heads, passes = ceil_div(whole_group, 8), pairs = kv_heads * passes;
  const int cluster = blockIdx.x / pairs, clusters = gridDim.x / pairs, pair = blockIdx.x - cluster * pairs;
  const int h = pair / passes, pass = pair - h * passes, b = blockIdx.z;
  const int rank = blockIdx.y, blocks_each = gridDim.y;
  const int group = min(8, whole_group - pass * 8), head0 = h * whole_group + pass * 8;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, row = lane >> 2, c4 = lane & 3;
  const int part = (cluster * blocks_each + rank) * WARPS + warp, warps_each = blocks_each * WARPS;
  let_next_kernel_start();
  // What this step's kernels do not write is read before the wait: lengths, tables, and all of the cache but the newest
  // token of each sequence, which is in its last tile. The block numbers of a context that starts with tile 0 and is left
  // to one cluster need not wait for its length.
  const int* table = block_table + (u64)b * max_blocks;
  const auto block_at = [&](int tile, int tiles) { return tile < tiles ? table[tile] : 0; };
  const int length = context_len[b];
  int blocks = block_at(part + lane * warps_each, max_blocks);
  if (length <= 0) {
    wait_for_previous_kernels();
    if (cluster == 0 && rank == 0)
      for (int i = threadIdx.x; i < group * HEAD_DIM; i += THREADS) out[((u64)b * heads + head0) * HEAD_DIM + i] = 0;
    return;
  }
  const int begin = window > 0 ? max(0, length - window) : 0, tile0 = begin >> 4, tiles = (length + 15) >> 4;
  const int used = min(clusters, ceil_div(tiles - tile0, warps_each * TILES_A_WARP));
  if (cluster >= used) return wait_for_previous_kernels();
  if (blocks_each > 1) cluster_arrive();  // this block has begun: its memory may be written
  const int first = tile0 + part, stride = used * warps_each, count = first < tiles ? ceil_div(tiles - first, stride) : 0;
  if (tile0 > 0 || used > 1) blocks = block_at(first + lane * stride, tiles);

  const smem_t ring = smem_address(base) + warp * R::OF_WARP;
  const auto fetch = [&](int n, int slot) {  // the warp's n-th tile
    if ((n & 31) == 0 && n > 0) blocks = block_at(first + (n + lane) * stride, tiles);
    const u64 from = ((u64)__shfl_sync(FULL_WARP, blocks, n & 31) * kv_heads + h) * (16 * HEAD_DIM);
    const smem_t to = ring + slot * STAGE;
#pragma unroll
    for (int at0 = 0; at0 < R::KEYS; at0 += 512) {
      const int at = at0 + lane * 16;
      copy_async_16(to + (at ^ (at / R::ROW & ODD) * 64), key_cache + from + at / 2, true);
      copy_async_16(to + R::KEYS + at + at / R::GROUP * 32, value_cache + from + at / 2, true);
    }
  };
  const bool has_newest = count > 0 && first + (count - 1) * stride == tiles - 1;
  const int early = min(count - has_newest, STAGES), filled = min(count, STAGES);
  for (int n = 0; n < early; n++) fetch(n, n), copy_async_commit();
  wait_for_previous_kernels();
  for (int n = early; n < filled; n++) fetch(n, n), copy_async_commit();
  for (int n = filled; n < STAGES; n++) copy_async_commit();  // a group a stage, empty or not

  const bf16* query = q + (u64)b * q_stride + (u64)(head0 + row) * HEAD_DIM;
  u32x4 qa[PIECES > 0 ? PIECES : 1];
  u32x2 qt = {{0, 0}};
#pragma unroll
  for (int j = 0; j < PIECES; j++) qa[j] = row < group ? load_stream(query + c4 * 8 + 32 * j) : u32x4{{0, 0, 0, 0}};
  if (KEY_TAIL && row < group) qt = load_stream8(query + 32 * PIECES + c4 * 4);

  float o[WORDS][4];  // both dimensions of the lane's word of V, of heads 2 c4 and 2 c4 + 1 each
#pragma unroll
  for (int w = 0; w < WORDS; w++)
#pragma unroll
    for (int e = 0; e < 4; e++) o[w][e] = 0.f;
  float m = MASKED, l = 0.f;  // of head `row`
  // Token 4 (column / 2) + 2 t + column % 2 is column `column` of product t: this lane's four are neighbours.
  const smem_t key_row = (4 * (row >> 1) + (row & 1)) * R::ROW, value_row = R::KEYS + c4 * R::GROUP_STRIDE;
  for (int n = 0, slot = 0; n < count; n++) {
    const int token0 = (first + n * stride) * 16;
    const smem_t keys = ring + slot * STAGE;
    copy_async_wait<STAGES - 1>();
    __syncwarp();
    if (token0 + 16 > length) {
      // Rows past the end have weight zero but may hold anything in the cache: keep 0 * NaN out.
      for (int i = (length - token0) * (HEAD_DIM / 8) + lane; i < 2 * HEAD_DIM; i += 32) {
        const int r = i / (HEAD_DIM / 8), at = i % (HEAD_DIM / 8);
        store_shared16(keys + R::KEYS + (r >> 2) * R::GROUP_STRIDE + (r & 3) * R::ROW + at * 16, u32x4{{0, 0, 0, 0}});
      }
      __syncwarp();
    }
    float c[2][2] = {{0.f, 0.f}, {0.f, 0.f}};
#pragma unroll
    for (int t = 0; t < 2; t++) {
      const smem_t from = keys + key_row + t * (2 * R::ROW);
      u32x4 k[PIECES > 0 ? PIECES : 1];
#pragma unroll
      for (int j = 0; j < PIECES; j++) k[j] = load_shared16(from + (j ^ (row & ODD)) * 64 + c4 * 16);
#pragma unroll
      for (int j = 0; j < PIECES; j++) {
        mma_bf16_top(c[t], qa[j].r[0], qa[j].r[1], k[j].r[0], k[j].r[1]);
        mma_bf16_top(c[t], qa[j].r[2], qa[j].r[3], k[j].r[2], k[j].r[3]);
      }
      if (KEY_TAIL) {
        const u32x2 kt = load_shared8(from + 64 * PIECES + c4 * 8);
        mma_bf16_top(c[t], qt.r[0], qt.r[1], kt.r[0], kt.r[1]);
      }
    }
    u32 v[4][WORDS];
#pragma unroll
    for (int y = 0; y < 4; y++) {
      const smem_t from = keys + value_row + y * R::ROW;
#pragma unroll
      for (int x = 0; x < WIDE; x++) {
        const u32x4 piece = load_shared16(from + x * 128 + row * 16);
#pragma unroll
        for (int i = 0; i < 4; i++) v[y][4 * x + i] = piece.r[i];
      }
      if (VALUE_TAIL == 1) v[y][WORDS - 1] = load_shared4(from + WIDE * 128 + row * 4);
      if (VALUE_TAIL == 2) {
        const u32x2 piece = load_shared8(from + WIDE * 128 + row * 8);
        v[y][WORDS - 2] = piece.r[0], v[y][WORDS - 1] = piece.r[1];
      }
    }
    float s[4], mx = m;
#pragma unroll
    for (int y = 0; y < 4; y++) {
      const int at = token0 + 4 * c4 + y;
      s[y] = c[y >> 1][y & 1] * scale;
      if (softcap > 0.f) s[y] = soft_cap(s[y], softcap);
      s[y] = at < length && at >= begin ? s[y] * LOG2E : MASKED;
      mx = fmaxf(mx, s[y]);
    }
    mx = fmaxf(mx, __shfl_xor_sync(FULL_WARP, mx, 1));
    mx = fmaxf(mx, __shfl_xor_sync(FULL_WARP, mx, 2));
    const float alpha = exp2_fast(m - mx);
    m = mx, l *= alpha;
#pragma unroll
    for (int y = 0; y < 4; y++) s[y] = exp2_fast(s[y] - mx), l += s[y];
    const u32 p0 = pack_bf16(s[0], s[1]), p1 = pack_bf16(s[2], s[3]);
    const float alpha0 = __shfl_sync(FULL_WARP, alpha, c4 * 8), alpha1 = __shfl_sync(FULL_WARP, alpha, c4 * 8 + 4);
#pragma unroll
    for (int w = 0; w < WORDS; w++) {
      o[w][0] *= alpha0, o[w][1] *= alpha1, o[w][2] *= alpha0, o[w][3] *= alpha1;
      mma_bf16(o[w],
               {__byte_perm(v[0][w], v[1][w], 0x5410), __byte_perm(v[0][w], v[1][w], 0x7632),
                __byte_perm(v[2][w], v[3][w], 0x5410), __byte_perm(v[2][w], v[3][w], 0x7632)},
               p0, p1);
    }
    __syncwarp();
    if (n + STAGES < count) fetch(n + STAGES, slot);
    copy_async_commit();
    if (++slot == STAGES) slot = 0;
  }
  l += __shfl_xor_sync(FULL_WARP, l, 1);
  l += __shfl_xor_sync(FULL_WARP, l, 2);

  // Put the warps' shares together; each leaves its own where its ring was.
  float* mine = (float*)(base + warp * R::OF_WARP);
#pragma unroll
  for (int w = 0; w < WORDS; w++) {
    const int d = w < 4 * WIDE ? row * 8 + 64 * (w / 4) + 2 * (w % 4) : 64 * WIDE + row * 2 * VALUE_TAIL + 2 * (w - 4 * WIDE);
#pragma unroll
    for (int e = 0; e < 2; e++) *(float2*)(mine + (2 * c4 + e) * SUMS + d) = make_float2(o[w][e], o[w][2 + e]);
  }
  if (c4 == 0) mine[8 * SUMS + row] = m, mine[8 * SUMS + 8 + row] = l;
  __syncthreads();

  const u64 head = (u64)b * heads + head0;
  const auto finish = [&](int i, const Sum& sum) {
    const int r = i / QUADS, d = i % QUADS * 4;
    if (used == 1) return sum.store(out + (head + r) * HEAD_DIM + d);
    const u64 at = (head + r) * clusters + cluster;
    *(float4*)(partial + at * HEAD_DIM + d) = sum.value;
    if (d == 0) statistic[at] = make_float2(sum.most, sum.weight);
  };
  const int each = 8 * QUADS / blocks_each, own = rank * each, own_end = min(own + each, group * QUADS);
  float4* parts = (float4*)(base + R::PARTS_AT);
  float2* statistics = (float2*)(base + R::STATISTICS_AT);
  if (blocks_each > 1) cluster_wait();  // all have begun
  for (int i = threadIdx.x; i < group * QUADS; i += THREADS) {
    const int r = i / QUADS, at = i % QUADS;
    Sum sum;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum.most = fmaxf(sum.most, ((const float*)(base + w * R::OF_WARP))[8 * SUMS + r]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float* from = (const float*)(base + w * R::OF_WARP);
      sum.add(exp2_fast(from[8 * SUMS + r] - sum.most), from[8 * SUMS + 8 + r], *(const float4*)(from + r * SUMS + at * 4));
    }
    if (blocks_each == 1) {
      finish(i, sum);
      continue;
    }
    const float4& v = sum.value;
    store_in_cluster4(smem_address(parts + rank * each + i % each), i / each, v.x, v.y, v.z, v.w);
    for (int to = at; to < blocks_each; to += QUADS) {
      const smem_t there = smem_address(statistics + rank * 8 + r);
      store_in_cluster(there, to, sum.most), store_in_cluster(there + 4, to, sum.weight);
    }
  }
  if (blocks_each > 1) {
    __syncwarp();
    cluster_arrive();
    cluster_wait();
    for (int i = own + threadIdx.x; i < own_end; i += THREADS) {
      const int r = i / QUADS;
      Sum sum;
      for (int k = 0; k < blocks_each; k++) sum.most = fmaxf(sum.most, statistics[k * 8 + r].x);
      for (int k = 0; k < blocks_each; k++)
        sum.add(exp2_fast(statistics[k * 8 + r].x - sum.most), statistics[k * 8 + r].y, parts[k * each + i - own]);
      finish(i, sum);
    }
  }
  if (used == 1) return;

  // The block of this rank that ends last has all of them to add up.
  u32* last = (u32*)(base + R::LAST_AT);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    u32* ticket = &tickets[(b * pairs + pair) * blocks_each + rank];
    *last = atomicAdd(ticket, 1u) == (u32)used - 1;
    if (*last) *ticket = 0;
  }
  __syncthreads();
  if (!*last) return;
  __threadfence();
  for (int i = own + threadIdx.x; i < own_end; i += THREADS) {
    const u64 of_head = (head + i / QUADS) * clusters;
    const int d = i % QUADS * 4;
    Sum sum;
    for (int k0 = 0; k0 < used; k0 += 8) {  // eight reads under way
      u32x4 v[8];
      float2 s[8];
      float mx = sum.most;
#pragma unroll
      for (int k = 0; k < 8; k++) {
        const u64 at = of_head + min(k0 + k, used - 1);
        s[k] = statistic[at], v[k] = load_stream(partial + at * HEAD_DIM + d);
      }
#pragma unroll
      for (int k = 0; k < 8; k++) mx = fmaxf(mx, s[k].x);
      Sum all;
      all.most = mx;
      all.add(exp2_fast(sum.most - mx), sum.weight, sum.value);
#pragma unroll
      for (int k = 0; k < 8; k++)
        all.add(k0 + k < used ? exp2_fast(s[k].x - mx) : 0.f, s[k].y,
                {__uint_as_float(v[k].r[0]), __uint_as_float(v[k].r[1]), __uint_as_float(v[k].r[2]), __uint_as_float(v[k].r[3])});
      sum = all;
    }
    sum.store(out + (head + i / QUADS) * HEAD_DIM + d);
  }
}

// Blocks on a multiprocessor: as many as its registers hold and the choice of launches counts on.
#define DECODE(NAME, WARPS)                                                                                              \
  KERNEL void __launch_bounds__(WARPS * 32, (HEAD_DIM > 64 ? 8 : 16) / WARPS)                                             \
      NAME(const bf16* __restrict__ q, int q_stride, const bf16* __restrict__ key_cache,                                 \
           const bf16* __restrict__ value_cache, const int* __restrict__ block_table,                                    \
           const int* __restrict__ context_len, bf16* __restrict__ out, float* __restrict__ partial,                     \
           float2* __restrict__ statistic, int max_blocks, int heads, int kv_heads, float scale, float softcap,          \
           int window) {                                                                                                 \
    decode<WARPS>(q, q_stride, key_cache, value_cache, block_table, context_len, out, partial, statistic, max_blocks,    \
                  heads, kv_heads, scale, softcap, window);                                                              \
  }
DECODE(attn_decode_w4, 4)
DECODE(attn_decode_w8, 8)

#undef MASKED
#undef TILES_A_WARP
#undef TICKETS
#undef DECODE
