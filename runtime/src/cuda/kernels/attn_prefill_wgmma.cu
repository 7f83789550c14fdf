// Paged causal attention of prefill chunks with Hopper's warpgroup products: what attn_prefill.cu does, arguments and
// results alike, for head_dim 64 and 128 on sm_90a.
//
// Grid: (heads, sum over sequences of ceil(rows / 128)), 256 threads; the y part may be padded. Dynamic shared memory:
// (128 + 4 * KEY_TILE) * HEAD_DIM * 2 + 1024 bytes. The longest rows start first.
//
// Two warpgroups of 64 queries each share K and V tiles, double-buffered by cp.async in the swizzled layout that wgmma
// reads. The scores of the next tile are issued before the sum over the tile at hand, so that the softmax of one runs
// while the tensor cores work on the other (FlashAttention 3, section 3.2).
// Expected: flops, 4 * HEAD_DIM * heads * (query, key) pairs; 383 TFLOP/s at 8,192
// tokens and head_dim 128 on an H200; one block a multiprocessor leaves the first loads of each uncovered.

#define ROWS 128
#define THREADS 256
#define KEY_TILE 128
#define PANELS (HEAD_DIM / 64)
#define CHUNKS (HEAD_DIM / 8)
#define KEY_STEPS (KEY_TILE / 16)
#define TILE_BYTES (KEY_TILE * HEAD_DIM * 2)

struct PrefillTile { int sequence, row; };

// Which sequence and which of its rows this block has; sequence -1 when the grid is larger than the work.
DEVICE PrefillTile find_tile(const int* query_start, int first, int last, int tile) {
  const int lane = threadIdx.x & 31;
  for (int s = first; s < last; s += 32) {
    const int mine = s + lane < last ? ceil_div(query_start[s + lane + 1] - query_start[s + lane], ROWS) : 0;
    int upto = mine;
#pragma unroll
    for (int o = 1; o < 32; o <<= 1) {
      const int before = __shfl_up_sync(FULL_WARP, upto, o);
      if (lane >= o) upto += before;
    }
    const u32 reached = __ballot_sync(FULL_WARP, tile < upto);
    if (reached) {
      const int at = __ffs(reached) - 1;
      return {s + at, (tile - __shfl_sync(FULL_WARP, upto - mine, at)) * ROWS};
    }
    tile -= __shfl_sync(FULL_WARP, upto, 31);
  }
  return {-1, 0};
}

// Where 16-byte piece c of row r lies in a tile of `rows` rows.
DEVICE u32 swizzled(int r, int c, int rows) { return (c >> 3) * rows * 128 + r * 128 + (((c & 7) ^ (r & 7)) << 4); }

struct KeyTiles {
  const int* blocks;  // of this sequence
  u64 block_stride;
  int end;  // keys from here on read as zeros
  DEVICE void load(smem_t to, const bf16* from, int key0) const {
    constexpr int EACH = KEY_TILE * CHUNKS / THREADS, STEP = THREADS / CHUNKS;  // rows that one round covers
    const int r0 = threadIdx.x / CHUNKS, c = threadIdx.x % CHUNKS;
    int block[EACH];
#pragma unroll
    for (int j = 0; j < EACH; j++) block[j] = key0 + r0 + j * STEP < end ? blocks[(key0 + r0 + j * STEP) >> 4] : 0;
#pragma unroll
    for (int j = 0; j < EACH; j++) {
      const int r = r0 + j * STEP, key = key0 + r;
      copy_async_16(to + swizzled(r, c, KEY_TILE), from + (u64)block[j] * block_stride + (key & 15) * HEAD_DIM + c * 8, key < end);
    }
  }
};

struct Mask {
  int window;
  float scale, softcap;
};

// Scores of one tile to weights, in place; the running maximum and sum move on. alpha: what o must be multiplied by.
DEVICE void softmax_tile(float (&s)[KEY_TILE / 8][4], float (&m)[2], float (&l)[2], float (&alpha)[2], int key0, int lane_first,
                         int group_first, const Mask& mask) {
  const int lane = threadIdx.x & 31;
  const float factor = mask.softcap > 0.f ? LOG2E : mask.scale * LOG2E;
  if (mask.softcap > 0.f) {
#pragma unroll
    for (int n = 0; n < KEY_TILE / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) s[n][e] = soft_cap(s[n][e] * mask.scale, mask.softcap);
  }
  if (key0 + KEY_TILE - 1 > group_first || (mask.window > 0 && key0 <= group_first + 63 - mask.window)) {
#pragma unroll
    for (int n = 0; n < KEY_TILE / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int key = key0 + n * 8 + (lane & 3) * 2 + (e & 1), at = lane_first + (e >> 1) * 8;
        if (key > at || (mask.window > 0 && key <= at - mask.window)) s[n][e] = minus_infinity();
      }
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float most = m[half];
#pragma unroll
    for (int n = 0; n < KEY_TILE / 8; n++) most = fmaxf(most, fmaxf(s[n][half * 2], s[n][half * 2 + 1]));
    most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, 1));
    most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, 2));
    const float base = most == minus_infinity() ? 0.f : most * factor;  // nothing seen yet: exponents stay -inf
    alpha[half] = exp2_fast(m[half] * factor - base);
    m[half] = most;
    float sum = 0.f;
#pragma unroll
    for (int n = 0; n < KEY_TILE / 8; n++)
#pragma unroll
      for (int e = half * 2; e < half * 2 + 2; e++) {
        s[n][e] = exp2_fast(s[n][e] * factor - base);
        sum += s[n][e];
      }
    l[half] = l[half] * alpha[half] + sum;
  }
}

DEVICE void issue_scores(float (&s)[KEY_TILE / 8][4], smem_t queries, smem_t keys) {
#pragma unroll
  for (int k = 0; k < HEAD_DIM / 16; k++)
    wgmma_shared(s, swizzled_tile(queries + (k >> 2) * ROWS * 128 + (k & 3) * 32, 1024, 16),
                 swizzled_tile(keys + (k >> 2) * KEY_TILE * 128 + (k & 3) * 32, 1024, 16), k > 0);
  wgmma_commit();
}

DEVICE void issue_sum(float (&o)[HEAD_DIM / 8][4], const u32 (&p)[KEY_STEPS][4], smem_t values) {
#pragma unroll
  for (int k = 0; k < KEY_STEPS; k++) wgmma_registers(o, p[k], swizzled_tile(values + k * 2048, 1024, KEY_TILE * 128));
  wgmma_commit();
}

DEVICE void pack_weights(u32 (&p)[KEY_STEPS][4], const float (&s)[KEY_TILE / 8][4]) {
#pragma unroll
  for (int k = 0; k < KEY_STEPS; k++) {
    p[k][0] = pack_bf16(s[2 * k][0], s[2 * k][1]), p[k][1] = pack_bf16(s[2 * k][2], s[2 * k][3]);
    p[k][2] = pack_bf16(s[2 * k + 1][0], s[2 * k + 1][1]), p[k][3] = pack_bf16(s[2 * k + 1][2], s[2 * k + 1][3]);
  }
}

KERNEL void __launch_bounds__(THREADS, 1)
attn_prefill_wgmma(const bf16* __restrict__ qkv, int q_stride, const bf16* __restrict__ key_cache,
                   const bf16* __restrict__ value_cache, const int* __restrict__ query_start,
                   const int* __restrict__ context_len, const int* __restrict__ block_table, bf16* __restrict__ out,
                   int max_blocks, int first, int last, int kv_heads, float scale, float softcap, int window) {
  DYNAMIC_SHARED(shared);
  let_next_kernel_start();
  wait_for_previous_kernels();
  const int heads = gridDim.x, head = blockIdx.x, lane = threadIdx.x & 31, warp = threadIdx.x >> 5, wgroup = threadIdx.x >> 7;
  const PrefillTile tile = find_tile(query_start, first, last, gridDim.y - 1 - blockIdx.y);
  if (tile.sequence < 0) return;
  const int row_begin = query_start[tile.sequence], rows = query_start[tile.sequence + 1] - row_begin;
  const int context = context_len[tile.sequence], position0 = context - rows + tile.row;
  const int kv_head = head / (heads / kv_heads);

  const smem_t q_at = (smem_address(shared) + 1023) / 1024 * 1024, k_at = q_at + ROWS * HEAD_DIM * 2, v_at = k_at + 2 * TILE_BYTES;
  for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
    const int r = i / CHUNKS, c = i % CHUNKS;
    const bool valid = tile.row + r < rows;
    const bf16* from = qkv + (u64)(row_begin + (valid ? tile.row + r : 0)) * q_stride + head * HEAD_DIM + c * 8;
    copy_async_16(q_at + swizzled(r, c, ROWS), from, valid);
  }
  const int key_end = min(context, position0 + ROWS);
  const int key_begin = window > 0 ? max(0, position0 - window + 1) / KEY_TILE * KEY_TILE : 0;
  const u64 head_offset = (u64)kv_head * 16 * HEAD_DIM;
  const bf16 *keys = key_cache + head_offset, *values = value_cache + head_offset;
  const KeyTiles tiles = {block_table + (u64)tile.sequence * max_blocks, (u64)kv_heads * 16 * HEAD_DIM, key_end};
  int key0 = (key_end - 1) / KEY_TILE * KEY_TILE, stage = 0;
  tiles.load(k_at, keys, key0);
  copy_async_commit();

  const smem_t queries = q_at + wgroup * 64 * 128;
  const int group_first = position0 + wgroup * 64, lane_first = group_first + (warp & 3) * 16 + (lane >> 2);
  const Mask mask = {window, scale, softcap};
  float o[HEAD_DIM / 8][4], s[KEY_TILE / 8][4] = {}, m[2] = {minus_infinity(), minus_infinity()}, l[2] = {0.f, 0.f}, alpha[2];
  u32 p[KEY_STEPS][4];
#pragma unroll
  for (int d = 0; d < HEAD_DIM / 8; d++) o[d][0] = o[d][1] = o[d][2] = o[d][3] = 0.f;

  // Brings in what the next turn reads: K of the tile before, V of this one.
  const auto turn = [&]() {
    copy_async_wait<0>();
    publish_shared();
    __syncthreads();
    if (key0 - KEY_TILE >= key_begin) tiles.load(k_at + (stage ^ 1) * TILE_BYTES, keys, key0 - KEY_TILE);
    tiles.load(v_at + stage * TILE_BYTES, values, key0);
    copy_async_commit();
  };
  turn();
  wgmma_fence();
  issue_scores(s, queries, k_at + stage * TILE_BYTES);
  wgmma_wait<0>();
  wgmma_settle(s);
  softmax_tile(s, m, l, alpha, key0, lane_first, group_first, mask);
  pack_weights(p, s);
  for (key0 -= KEY_TILE, stage ^= 1; key0 >= key_begin; key0 -= KEY_TILE, stage ^= 1) {
    turn();
    wgmma_settle(o);
    wgmma_fence();
    issue_scores(s, queries, k_at + stage * TILE_BYTES);
    issue_sum(o, p, v_at + (stage ^ 1) * TILE_BYTES);
    wgmma_wait<1>();
    wgmma_settle(s);
    softmax_tile(s, m, l, alpha, key0, lane_first, group_first, mask);
    wgmma_wait<0>();
    wgmma_settle(o);
#pragma unroll
    for (int d = 0; d < HEAD_DIM / 8; d++) o[d][0] *= alpha[0], o[d][1] *= alpha[0], o[d][2] *= alpha[1], o[d][3] *= alpha[1];
    pack_weights(p, s);
  }
  copy_async_wait<0>();
  publish_shared();
  __syncthreads();
  wgmma_settle(o);
  wgmma_fence();
  issue_sum(o, p, v_at + (stage ^ 1) * TILE_BYTES);
  wgmma_wait<0>();
  wgmma_settle(o);

  // Through the warp's own rows of the query tile, so that rows leave in 16-byte pieces. Its warpgroup is done with them.
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float sum = l[half];
    sum += __shfl_xor_sync(FULL_WARP, sum, 1);
    sum += __shfl_xor_sync(FULL_WARP, sum, 2);
    const float share = sum > 0.f ? 1.f / sum : 0.f;
    const int r = warp * 16 + half * 8 + (lane >> 2);
#pragma unroll
    for (int d = 0; d < HEAD_DIM / 8; d++)
      store_shared4(q_at + swizzled(r, d, ROWS) + (lane & 3) * 4, pack_bf16(o[d][half * 2] * share, o[d][half * 2 + 1] * share));
  }
  __syncwarp();
  for (int i = lane; i < 16 * CHUNKS; i += 32) {
    const int r = warp * 16 + i / CHUNKS, c = i % CHUNKS;
    if (tile.row + r < rows)
      *(u32x4*)(out + ((u64)(row_begin + tile.row + r) * heads + head) * HEAD_DIM + c * 8) = load_shared16(q_at + swizzled(r, c, ROWS));
  }
}
#undef ROWS
#undef THREADS
#undef KEY_TILE
#undef PANELS
#undef CHUNKS
#undef KEY_STEPS
#undef TILE_BYTES
