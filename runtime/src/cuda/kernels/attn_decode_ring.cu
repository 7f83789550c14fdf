// Paged decode attention of Hopper: what attn_decode.cu computes, with the cache coming through rings in shared memory and
// the splits of a context put together inside of a cluster, in the same launch.
//
//   attn_decode_w{W}s{S}: W warps a block, each with a ring of S tiles (16 tokens of K and V); with u, V in one copy and
//   not free of bank conflicts; with a, by each lane's asynchronous copies instead of the copy engine.
//
// Arguments as of attn_decode. `clusters` clusters of C blocks (C 1, 2, 4 or 8, along y) divide a context, tile by tile in
// turn; a short one is left to the first cluster. Several clusters meet through `partial` [sequences, heads, clusters,
// HEAD_DIM] and `statistic` [sequences, heads, clusters], and the one that ends last writes `out`; then
// sequences * kv_heads * ceil(group / 8) * C is at most TICKETS.
// Grid: (clusters * kv_heads * ceil(group / 8), C, sequences), 32 W threads. Dynamic shared memory: Ring::BYTES.
//
// The 16 tokens of a block are contiguous for each KV head: bulk copies by the copy engine, one of K and four of V, without
// a register under way, and a ring's worth of them before the kernel before has ended. What keeps 16-byte reads of rows
// of 128 bytes free of bank conflicts:
// - K: odd rows take the other one of two neighbouring 64-byte pieces. The product has 16 rows for 8 heads: rows 8..15 hold
//   the query with those pieces exchanged, so that odd columns are right there.
// - V: four tokens a copy, 32 bytes apart, and the four lanes of a row read from four different copies.
// Expected: bytes of K and V, sequences * context * kv_heads * HEAD_DIM * 4 at 4.36 TB/s.

#define MASKED -1e30f
#define TILES_A_WARP 8  // before a second cluster is worth its meeting
#define TICKETS 2048

DEVICE_COUNTER tickets[TICKETS];  // zero between launches

enum Copies { APART, TOGETHER, BY_LANES };

template <int WARPS, int STAGES, Copies COPIES> struct Ring {
  static constexpr int KEYS = 32 * HEAD_DIM, GROUP = 8 * HEAD_DIM, GROUP_STRIDE = GROUP + (COPIES == TOGETHER ? 0 : 32);
  static constexpr int STAGE = KEYS + 4 * GROUP_STRIDE;
  static constexpr int OF_WARP = STAGES * STAGE;
  static constexpr int PARTS_AT = WARPS * OF_WARP;              // [C][8 * HEAD_DIM / C] f32, from all blocks of the cluster
  static constexpr int STATISTICS_AT = PARTS_AT + 32 * HEAD_DIM;  // [8 blocks][8 heads] (most, weight)
  static constexpr int BARRIERS_AT = STATISTICS_AT + 512;
  static constexpr int LAST_AT = BARRIERS_AT + WARPS * STAGES * 8;
  static constexpr int BYTES = LAST_AT + 16;
};

DEVICE int clusters_used(int tiles, int clusters, int warps) { return max(1, min(clusters, ceil_div(tiles, warps * TILES_A_WARP))); }

// Sums that belong to different greatest scores, put together.
struct Sum {
  float most = MASKED, weight = 0.f;
  float4 value = {0.f, 0.f, 0.f, 0.f};
  DEVICE void add(float factor, float w, const float4& v) {
    weight += w * factor;
    value.x += v.x * factor, value.y += v.y * factor, value.z += v.z * factor, value.w += v.w * factor;
  }
};

template <int WARPS, int STAGES, Copies COPIES> DEVICE void
decode_ring(const bf16* __restrict__ q, int q_stride, const bf16* __restrict__ key_cache, const bf16* __restrict__ value_cache,
            const int* __restrict__ block_table, const int* __restrict__ context_len, bf16* __restrict__ out,
            float* __restrict__ partial, float2* __restrict__ statistic, int max_blocks, int heads, int kv_heads, float scale,
            float softcap, int window) {
  static_assert(HEAD_DIM % 64 == 0);
  using R = Ring<WARPS, STAGES, COPIES>;
  constexpr int PIECES = HEAD_DIM / 32, WIDE = HEAD_DIM / 64, THREADS = WARPS * 32;
  constexpr int ROW = HEAD_DIM + 4, QUADS = HEAD_DIM / 4;  // of the sums that warps leave: [8][ROW], then most [8], weight [8]
  static_assert((8 * ROW + 16) * 4 <= R::OF_WARP);
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
  const int used = clusters_used(tiles - tile0, clusters, warps_each);
  if (cluster >= used) return wait_for_previous_kernels();
  if (blocks_each > 1) cluster_arrive();  // this block has begun: its memory may be written
  const int first = tile0 + part, stride = used * warps_each, count = first < tiles ? ceil_div(tiles - first, stride) : 0;
  if (tile0 > 0 || used > 1) blocks = block_at(first + lane * stride, tiles);

  const smem_t ring = smem_address(base) + warp * R::OF_WARP, barriers = smem_address(base + R::BARRIERS_AT) + warp * STAGES * 8;
  if (lane == 0) {
#pragma unroll
    for (int s = 0; s < STAGES; s++) barrier_init(barriers + s * 8, 1);
    publish_shared();
  }
  __syncwarp();
  const auto fetch = [&](int n, int slot) {  // the warp's n-th tile
    if ((n & 31) == 0 && n > 0) blocks = block_at(first + (n + lane) * stride, tiles);
    const u64 from = ((u64)__shfl_sync(FULL_WARP, blocks, n & 31) * kv_heads + h) * (16 * HEAD_DIM);
    const smem_t to = ring + slot * R::STAGE, barrier = barriers + slot * 8;
    if (COPIES == BY_LANES) {
#pragma unroll
      for (int at = 0; at < R::KEYS; at += 512) {
        copy_async_16(to + at + lane * 16, key_cache + from + at / 2 + lane * 8, true);
        copy_async_16(to + R::KEYS + at + at / R::GROUP * 32 + lane * 16, value_cache + from + at / 2 + lane * 8, true);
      }
    } else if (lane == 0) {
      barrier_arrive_expect(barrier, 64 * HEAD_DIM);
      copy_bulk(to, key_cache + from, R::KEYS, barrier);
    } else if (COPIES == TOGETHER) {
      if (lane == 1) copy_bulk(to + R::KEYS, value_cache + from, R::KEYS, barrier);
    } else if (lane <= 4) {
      copy_bulk(to + R::KEYS + (lane - 1) * R::GROUP_STRIDE, value_cache + from + (lane - 1) * (4 * HEAD_DIM), R::GROUP, barrier);
    }
  };
  const bool has_newest = count > 0 && first + (count - 1) * stride == tiles - 1;
  const int early = min(count - has_newest, STAGES), filled = min(count, STAGES);
  for (int n = 0; n < early; n++) fetch(n, n), copy_async_commit();
  wait_for_previous_kernels();
  for (int n = max(0, early); n < filled; n++) fetch(n, n), copy_async_commit();
  for (int n = filled; n < STAGES; n++) copy_async_commit();  // a group a stage, empty or not

  const bf16* query = q + (u64)b * q_stride + (u64)(head0 + row) * HEAD_DIM;
  u32x4 qa[PIECES];
#pragma unroll
  for (int j = 0; j < PIECES; j++) qa[j] = row < group ? load_stream(query + c4 * 8 + 32 * j) : u32x4{{0, 0, 0, 0}};

  float o[WIDE][4][4];  // dimensions row * 8 + 64 x + 2 i (and + 1) of heads 2 c4 and 2 c4 + 1
#pragma unroll
  for (int x = 0; x < WIDE; x++)
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int e = 0; e < 4; e++) o[x][i][e] = 0.f;
  float m = MASKED, l = 0.f;  // of head `row`
  // Token 4 (column / 2) + 2 n + column % 2 is column `column` of product n: this lane's four are neighbours.
  const smem_t key_row = (4 * (row >> 1) + (row & 1)) * (2 * HEAD_DIM) + c4 * 16, value_row = R::KEYS + c4 * R::GROUP_STRIDE + row * 16;
  int slot = 0;
  u32 parity = 0;
  for (int n = 0; n < count; n++) {
    const int token0 = (first + n * stride) * 16;
    const smem_t keys = ring + slot * R::STAGE;
    if (COPIES == BY_LANES) {
      copy_async_wait<STAGES - 1>();
    } else {
      barrier_wait(barriers + slot * 8, parity);
    }
    __syncwarp();
    if (token0 + 16 > length) {
      // Rows past the end have weight zero but may hold anything in the cache: keep 0 * NaN out.
      for (int i = (length - token0) * (HEAD_DIM / 8) + lane; i < 2 * HEAD_DIM; i += 32) {
        const int r = i / (HEAD_DIM / 8), at = i % (HEAD_DIM / 8);
        store_shared16(keys + R::KEYS + (r >> 2) * R::GROUP_STRIDE + (r & 3) * (2 * HEAD_DIM) + at * 16, u32x4{{0, 0, 0, 0}});
      }
      __syncwarp();
    }
    float c[2][4] = {{0.f, 0.f, 0.f, 0.f}, {0.f, 0.f, 0.f, 0.f}};
#pragma unroll
    for (int t = 0; t < 2; t++) {
      u32x4 k[PIECES];
#pragma unroll
      for (int j = 0; j < PIECES; j++) k[j] = load_shared16(keys + key_row + t * (4 * HEAD_DIM) + ((j ^ (row & 1)) * 64));
#pragma unroll
      for (int j = 0; j < PIECES; j++) {
        const u32x4 &even = qa[j], &odd = qa[j ^ 1];
        mma_bf16(c[t], {even.r[0], odd.r[0], even.r[1], odd.r[1]}, k[j].r[0], k[j].r[1]);
        mma_bf16(c[t], {even.r[2], odd.r[2], even.r[3], odd.r[3]}, k[j].r[2], k[j].r[3]);
      }
    }
    u32x4 v[WIDE][4];
#pragma unroll
    for (int x = 0; x < WIDE; x++)
#pragma unroll
      for (int y = 0; y < 4; y++) v[x][y] = load_shared16(keys + value_row + y * (2 * HEAD_DIM) + x * 128);
    float s[4], mx = m;
#pragma unroll
    for (int y = 0; y < 4; y++) {
      const int at = token0 + 4 * c4 + y;
      s[y] = c[y >> 1][(y & 1) * 3] * scale;
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
    for (int x = 0; x < WIDE; x++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        o[x][i][0] *= alpha0, o[x][i][1] *= alpha1, o[x][i][2] *= alpha0, o[x][i][3] *= alpha1;
        mma_bf16(o[x][i],
                 {__byte_perm(v[x][0].r[i], v[x][1].r[i], 0x5410), __byte_perm(v[x][0].r[i], v[x][1].r[i], 0x7632),
                  __byte_perm(v[x][2].r[i], v[x][3].r[i], 0x5410), __byte_perm(v[x][2].r[i], v[x][3].r[i], 0x7632)},
                 p0, p1);
      }
    __syncwarp();
    if (n + STAGES < count) fetch(n + STAGES, slot);
    copy_async_commit();
    if (++slot == STAGES) slot = 0, parity ^= 1;
  }
  l += __shfl_xor_sync(FULL_WARP, l, 1);
  l += __shfl_xor_sync(FULL_WARP, l, 2);

  // Put the warps' shares together; each leaves its own where its ring was.
  float* mine = (float*)(base + warp * R::OF_WARP);
#pragma unroll
  for (int x = 0; x < WIDE; x++)
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int e = 0; e < 2; e++)
        *(float2*)(mine + (2 * c4 + e) * ROW + row * 8 + 64 * x + 2 * i) = make_float2(o[x][i][e], o[x][i][2 + e]);
  if (c4 == 0) mine[8 * ROW + row] = m, mine[8 * ROW + 8 + row] = l;
  __syncthreads();

  const u64 head = (u64)b * heads + head0;
  const auto finish = [&](int i, const Sum& sum) {
    const int r = i / QUADS, d = i % QUADS * 4;
    if (used > 1) {
      const u64 at = (head + r) * clusters + cluster;
      *(float4*)(partial + at * HEAD_DIM + d) = sum.value;
      if (d == 0) statistic[at] = make_float2(sum.most, sum.weight);
    } else {
      const float f = 1.f / sum.weight;
      *(u32x2*)(out + (head + r) * HEAD_DIM + d) = {{pack_bf16(sum.value.x * f, sum.value.y * f), pack_bf16(sum.value.z * f, sum.value.w * f)}};
    }
  };
  const int each = 8 * QUADS / blocks_each, own = rank * each, own_end = min(own + each, group * QUADS);
  float4* parts = (float4*)(base + R::PARTS_AT);
  float2* statistics = (float2*)(base + R::STATISTICS_AT);
  if (blocks_each > 1) cluster_wait();  // all have begun
  for (int i = threadIdx.x; i < group * QUADS; i += THREADS) {
    const int r = i / QUADS, at = i % QUADS;
    Sum sum;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum.most = fmaxf(sum.most, ((const float*)(base + w * R::OF_WARP))[8 * ROW + r]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float* from = (const float*)(base + w * R::OF_WARP);
      sum.add(exp2_fast(from[8 * ROW + r] - sum.most), from[8 * ROW + 8 + r], *(const float4*)(from + r * ROW + at * 4));
    }
    if (blocks_each == 1) {
      finish(i, sum);
      continue;
    }
    const float4& v = sum.value;
    store_in_cluster4(smem_address(parts + rank * each + i % each), i / each, v.x, v.y, v.z, v.w);
    if (at < blocks_each) {
      const smem_t to = smem_address(statistics + rank * 8 + r);
      store_in_cluster(to, at, sum.most), store_in_cluster(to + 4, at, sum.weight);
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
    const int r = i / QUADS, d = i % QUADS * 4;
    const float2* from = statistic + (head + r) * clusters;
    Sum sum;
    for (int k = 0; k < used; k++) sum.most = fmaxf(sum.most, from[k].x);
    for (int k = 0; k < used; k++) {
      const u32x4 v = load_stream(partial + ((head + r) * clusters + k) * HEAD_DIM + d);
      sum.add(exp2_fast(from[k].x - sum.most), from[k].y,
              {__uint_as_float(v.r[0]), __uint_as_float(v.r[1]), __uint_as_float(v.r[2]), __uint_as_float(v.r[3])});
    }
    const float f = 1.f / sum.weight;
    *(u32x2*)(out + (head + r) * HEAD_DIM + d) = {{pack_bf16(sum.value.x * f, sum.value.y * f), pack_bf16(sum.value.z * f, sum.value.w * f)}};
  }
}

#define DECODE(NAME, WARPS, STAGES, COPIES)                                                                              \
  KERNEL void __launch_bounds__(WARPS * 32, 1)                                                                            \
      NAME(const bf16* __restrict__ q, int q_stride, const bf16* __restrict__ key_cache,                                 \
           const bf16* __restrict__ value_cache, const int* __restrict__ block_table,                                    \
           const int* __restrict__ context_len, bf16* __restrict__ out, float* __restrict__ partial,                     \
           float2* __restrict__ statistic, int max_blocks, int heads, int kv_heads, float scale, float softcap,          \
           int window) {                                                                                                 \
    decode_ring<WARPS, STAGES, COPIES>(q, q_stride, key_cache, value_cache, block_table, context_len, out, partial,      \
                                       statistic, max_blocks, heads, kv_heads, scale, softcap, window);                  \
  }
DECODE(attn_decode_w4s2, 4, 2, APART)
DECODE(attn_decode_w4s3, 4, 3, APART)
DECODE(attn_decode_w4s4, 4, 4, APART)
DECODE(attn_decode_w8s2, 8, 2, APART)
DECODE(attn_decode_w8s3, 8, 3, APART)
DECODE(attn_decode_w8s6, 8, 6, APART)
DECODE(attn_decode_w16s3, 16, 3, APART)
DECODE(attn_decode_w4s3u, 4, 3, TOGETHER)
DECODE(attn_decode_w8s2u, 8, 2, TOGETHER)
DECODE(attn_decode_w8s3u, 8, 3, TOGETHER)
DECODE(attn_decode_w16s3u, 16, 3, TOGETHER)
DECODE(attn_decode_w4s2a, 4, 2, BY_LANES)
DECODE(attn_decode_w4s3a, 4, 3, BY_LANES)
DECODE(attn_decode_w4s4a, 4, 4, BY_LANES)
DECODE(attn_decode_w8s2a, 8, 2, BY_LANES)
DECODE(attn_decode_w8s3a, 8, 3, BY_LANES)
DECODE(attn_decode_w16s3a, 16, 3, BY_LANES)

#undef MASKED
#undef TILES_A_WARP
#undef TICKETS
#undef DECODE
