// Paged causal attention of prefill chunks with Hopper's warpgroup products: what attn_prefill.cu does, with the same
// arguments and results, for head_dim 64 and 128 on sm_90a.
//
// Grid: as many blocks as multiprocessors or work items, an item being 128 rows of one head: heads * tiles of them, tiles
// being the sum over sequences of ceil(rows / 128), or more. (2 + 1) * 128 threads. Dynamic shared memory:
// (128 + 2 * STAGES * 128) * HEAD_DIM * 2 + 1024 bytes.
//
// Items go from the longest rows to the shortest, dealt forwards and backwards in turn, so that the blocks end together.
// One warpgroup brings Q, K and V in by cp.async, ahead of and across items, in the swizzled layout that wgmma reads;
// two of 64 queries each compute. These issue the scores of the next tile before the sum over the tile at hand, so that
// the softmax of one runs beside the products of the other (FlashAttention 3, section 3.2), and take turns in issuing,
// so that one has products under way while the other is in its softmax (section 3.1).
// Expected: flops, 4 * HEAD_DIM * heads * (query, key) pairs.

#ifndef STAGES
#define STAGES 2
#endif
#ifndef TAKE_TURNS
#define TAKE_TURNS 1
#endif
#ifndef TMA
#define TMA 1
#endif
#ifndef PROBE_NOFENCE
#define PROBE_NOFENCE 0
#endif
#ifndef PROBE_NOLOAD
#define PROBE_NOLOAD 0
#endif
#ifndef LAZY
#define LAZY 1
#endif
#ifndef CONSUMERS
#define CONSUMERS 2
#endif
#define ROWS (64 * CONSUMERS)
#define KEY_TILE 128
#define CHUNKS (HEAD_DIM / 8)
#define KEY_STEPS (KEY_TILE / 16)
#define TILE_BYTES (KEY_TILE * HEAD_DIM * 2)
#define LOADERS 128
#define PANELS (HEAD_DIM / 64)
#define LOAD_STEP (LOADERS / CHUNKS)  // rows that one round of the loaders covers: a multiple of 8

struct PrefillTile { int sequence, row; };

// Which sequence and which of its rows tile number `tile` is; sequence -1 when there are fewer tiles.
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

// What the loaders tell those who compute. tiles 0: no more items.
struct Item {
  int row, rows;  // first row of the step, and how many there are
  int head, position;
  int key0, tiles;  // first key of the last tile, which comes first
  int end;          // keys from here on do not exist
};

// Items that were taken beyond the first of each block, and blocks that found none left. The last sets both to zero.
DEVICE_COUNTER items_taken;
DEVICE_COUNTER blocks_ended;

// Barriers, in order: Q full and empty, then for each stage K full and empty, V full and empty.
#define BARRIERS (2 + 4 * STAGES)
struct Barriers {
  smem_t at;
  DEVICE smem_t query_full() const { return at; }
  DEVICE smem_t query_empty() const { return at + 8; }
  DEVICE smem_t key_full(int stage) const { return at + 16 + stage * 32; }
  DEVICE smem_t key_empty(int stage) const { return at + 24 + stage * 32; }
  DEVICE smem_t value_full(int stage) const { return at + 32 + stage * 32; }
  DEVICE smem_t value_empty(int stage) const { return at + 40 + stage * 32; }
};

// A place in the ring of stages, and the parity of its barriers.
struct Turn {
  int stage = 0;
  u32 parity = 0;
  DEVICE void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

// Where 16-byte piece c of row r lies in a tile of `rows` rows.
DEVICE u32 swizzled(int r, int c, int rows) { return (c >> 3) * rows * 128 + r * 128 + (((c & 7) ^ (r & 7)) << 4); }

// One tile of keys or values: this thread's pieces of it. Keys from `end` on read as zeros.
DEVICE void load_tile(smem_t to, const bf16* from, const int* blocks, u64 block_stride, int key0, int end) {
  const int r0 = threadIdx.x / CHUNKS, c = threadIdx.x % CHUNKS;
  to += swizzled(r0, c, KEY_TILE);
  from += r0 * HEAD_DIM + c * 8;
  blocks += key0 >> 4;
  int block[KEY_STEPS];  // all of them first: their loads overlap
  if (key0 + KEY_TILE <= end) {
#pragma unroll
    for (int b = 0; b < KEY_STEPS; b++) block[b] = blocks[b];
#pragma unroll
    for (int r = 0; r < KEY_TILE; r += LOAD_STEP)
      copy_async_16(to + r * 128, from + (u64)(u32)block[r >> 4] * block_stride + (r & 15) * HEAD_DIM, true);
  } else {
#pragma unroll
    for (int b = 0; b < KEY_STEPS; b++) block[b] = key0 + b * 16 < end ? blocks[b] : 0;
#pragma unroll
    for (int r = 0; r < KEY_TILE; r += LOAD_STEP)
      copy_async_16(to + r * 128, from + (u64)(u32)block[r >> 4] * block_stride + (r & 15) * HEAD_DIM, key0 + r + r0 < end);
  }
}

DEVICE void load_queries(smem_t to, const bf16* from, int q_stride, int rows) {
  const int r0 = threadIdx.x / CHUNKS, c = threadIdx.x % CHUNKS;
  to += swizzled(r0, c, ROWS);
  from += c * 8;
#pragma unroll 4
  for (int r = 0; r < ROWS; r += LOAD_STEP)
    copy_async_16(to + r * 128, from + (u64)(r + r0 < rows ? r + r0 : 0) * q_stride, r + r0 < rows);
}

// Rows of a tile of values from `row` on become zero.
DEVICE void clear_rows(smem_t tile, int row) {
  for (int i = row * CHUNKS + (threadIdx.x & 127); i < KEY_TILE * CHUNKS; i += 128)
    store_shared16(tile + swizzled(i / CHUNKS, i % CHUNKS, KEY_TILE), u32x4{{0, 0, 0, 0}});
}

DEVICE void publish_loads() {
  if (!TMA && !PROBE_NOFENCE) publish_shared();
}

// Named barriers: those on which warpgroups wait for their turn come first.
#define NEXT_ITEM 8
#define CLEARED 9

struct Mask {
  int window;
  float scale, softcap;
};

// Scores of one tile to weights, in place; the running maximum and sum move on. alpha: what o must be multiplied by.
DEVICE bool softmax_tile(float (&s)[KEY_TILE / 8][4], float (&m)[2], float (&l)[2], float (&alpha)[2], int key0, int lane_first,
                         int group_first, const Mask& mask) {
  const int lane = threadIdx.x & 31;
  const float factor = mask.softcap > 0.f ? LOG2E : mask.scale * LOG2E;
  bool moved = !LAZY;
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
#if LAZY
    most = (most - m[half]) * factor > 8.f ? most : m[half];  // while nothing was seen, m is -inf: inf > 8
    moved |= most != m[half];
#endif
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
  return LAZY ? __ballot_sync(FULL_WARP, moved) != 0 : true;
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

// Four lanes hold two columns each of four pieces of eight: afterwards lane c has all of piece c, 16 bytes.
DEVICE u32x4 gather_piece(u32 a, u32 b, u32 c, u32 d) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
  const u32 ab = __shfl_xor_sync(FULL_WARP, odd ? a : b, 1), cd = __shfl_xor_sync(FULL_WARP, odd ? c : d, 1);
  const u32 a1 = odd ? ab : a, b1 = odd ? b : ab, c1 = odd ? cd : c, d1 = odd ? d : cd;
  const u32 ac = __shfl_xor_sync(FULL_WARP, high ? a1 : c1, 2), bd = __shfl_xor_sync(FULL_WARP, high ? b1 : d1, 2);
  return {{high ? ac : a1, high ? bd : b1, high ? c1 : ac, high ? d1 : bd}};
}

KERNEL void __launch_bounds__(LOADERS + 128 * CONSUMERS, 1)
attn_prefill_wgmma(const bf16* __restrict__ qkv, int q_stride, const TensorMap* __restrict__ key_map,
                   const TensorMap* __restrict__ value_map, const int* __restrict__ query_start,
                   const int* __restrict__ context_len, const int* __restrict__ block_table, bf16* __restrict__ out,
                   int max_blocks, int first, int last, int kv_heads, float scale, float softcap, int window, int heads,
                   int tiles) {
  DYNAMIC_SHARED(shared);
  __shared__ u64 barrier_words[BARRIERS];
  __shared__ Item item;
  __shared__ int next_item[2];
  const Barriers barriers = {smem_address(barrier_words)};
  if (threadIdx.x == 0) {
    barrier_init(barriers.query_full(), LOADERS + 1);
    barrier_init(barriers.query_empty(), 4 * CONSUMERS);
    for (int i = 0; i < STAGES; i++) {
      barrier_init(barriers.key_full(i), TMA ? 1 : LOADERS), barrier_init(barriers.value_full(i), TMA ? 1 : LOADERS);
      barrier_init(barriers.key_empty(i), 4 * CONSUMERS), barrier_init(barriers.value_empty(i), 4 * CONSUMERS);
    }
  }
  __syncthreads();
  let_next_kernel_start();
  wait_for_previous_kernels();
  const smem_t q_at = (smem_address(shared) + 1023) / 1024 * 1024, k_at = q_at + ROWS * HEAD_DIM * 2;
  const smem_t v_at = k_at + STAGES * TILE_BYTES;

  if (threadIdx.x < LOADERS) {
    fewer_registers<CONSUMERS == 2 ? 40 : 32>();
    Turn key_turn, value_turn;
    u32 query_parity = 1;
    const int items = heads * tiles, lane = threadIdx.x & 31;
#if TMA
    const bool copier = threadIdx.x < 32;
    if (copier) acquire_map(key_map), acquire_map(value_map);
#endif
    for (int i = blockIdx.x, round = 0; i < items; round++) {
      u32 taken = 0;
      if (threadIdx.x == 0) taken = atomicAdd(&items_taken, 1u);
      const int tile_number = i / heads, head = i - tile_number * heads;
      const PrefillTile tile = find_tile(query_start, first, last, tiles - 1 - tile_number);
      if (tile.sequence >= 0) {
        const int row_begin = query_start[tile.sequence], rows = query_start[tile.sequence + 1] - row_begin;
        const int context = context_len[tile.sequence], position = context - rows + tile.row;
        const int end = min(context, position + ROWS);
        const int key_begin = window > 0 ? max(0, position - window + 1) / KEY_TILE * KEY_TILE : 0;
        const int kv_head = head / (heads / kv_heads);
        const int* table = block_table + (u64)tile.sequence * max_blocks;
        int key0 = (end - 1) / KEY_TILE * KEY_TILE;
#if TMA
        // A lane has a box of a tile: 16 keys, 64 columns.
        const int box = lane / PANELS, panel = lane % PANELS;
        const auto block_at = [&](int key) { return lane < KEY_STEPS * PANELS && key + box * 16 < end ? table[(key >> 4) + box] : -1; };
        const auto load = [&](smem_t to, const TensorMap* map, int key, int block, smem_t full, smem_t empty, u32 parity) {
          barrier_wait(empty, parity ^ 1);
          if (lane == 0) barrier_arrive_expect(full, PROBE_NOLOAD ? 0 : min(KEY_STEPS, ceil_div(end - key, 16)) * (16 * HEAD_DIM * 2));
          __syncwarp();
          if (block >= 0 && !PROBE_NOLOAD) copy_box(to + panel * (KEY_TILE * 128) + box * 2048, map, panel * 64, (block * kv_heads + kv_head) * 16, full);
        };
        const auto load_keys = [&](int key, int block) {
          load(k_at + key_turn.stage * TILE_BYTES, key_map, key, block, barriers.key_full(key_turn.stage),
               barriers.key_empty(key_turn.stage), key_turn.parity);
          key_turn.next();
        };
        const auto load_values = [&](int key, int block) {
          load(v_at + value_turn.stage * TILE_BYTES, value_map, key, block, barriers.value_full(value_turn.stage),
               barriers.value_empty(value_turn.stage), value_turn.parity);
          value_turn.next();
        };
        int block = block_at(key0);
        const bool copies = copier;
#else
        const u64 head_offset = (u64)kv_head * 16 * HEAD_DIM, block_stride = (u64)kv_heads * 16 * HEAD_DIM;
        const bf16 *keys = (const bf16*)key_map + head_offset, *values = (const bf16*)value_map + head_offset;
        const bool copies = true;
        int block = 0;
        const auto block_at = [&](int key) { return 0; };
        const auto load_keys = [&](int key, int) {
          barrier_wait(barriers.key_empty(key_turn.stage), key_turn.parity ^ 1);
          if (!PROBE_NOLOAD) load_tile(k_at + key_turn.stage * TILE_BYTES, keys, table, block_stride, key, end);
          barrier_arrive_after_copies(barriers.key_full(key_turn.stage));
          key_turn.next();
        };
        const auto load_values = [&](int key, int) {
          barrier_wait(barriers.value_empty(value_turn.stage), value_turn.parity ^ 1);
          if (!PROBE_NOLOAD) load_tile(v_at + value_turn.stage * TILE_BYTES, values, table, block_stride, key, end);
          barrier_arrive_after_copies(barriers.value_full(value_turn.stage));
          value_turn.next();
        };
#endif
        if (copies) load_keys(key0, block);
        barrier_wait(barriers.query_empty(), query_parity);
        query_parity ^= 1;
        load_queries(q_at, qkv + (u64)(row_begin + tile.row) * q_stride + head * HEAD_DIM, q_stride, rows - tile.row);
        barrier_arrive_after_copies(barriers.query_full());
        if (threadIdx.x == 0) {
          item = {row_begin + tile.row, rows - tile.row, head, position, key0, (key0 - key_begin) / KEY_TILE + 1, end};
          barrier_arrive(barriers.query_full());
        }
        if (copies) {
          for (; key0 > key_begin; key0 -= KEY_TILE) {
            const int next = block_at(key0 - KEY_TILE);
            load_keys(key0 - KEY_TILE, next);
            load_values(key0, block);
            block = next;
          }
          load_values(key0, block);
        }
      }
      if (threadIdx.x == 0) next_item[round & 1] = gridDim.x + taken;
      named_wait(NEXT_ITEM, LOADERS);
      i = next_item[round & 1];
    }
    barrier_wait(barriers.query_empty(), query_parity);
    if (threadIdx.x == 0) {
      item.tiles = 0;
      barrier_arrive(barriers.query_full());
      if (atomicAdd(&blocks_ended, 1u) == gridDim.x - 1) items_taken = 0, blocks_ended = 0;
    }
    barrier_arrive(barriers.query_full());
    copy_async_commit();
    copy_async_wait<0>();
  } else {
    more_registers<CONSUMERS == 2 ? 232 : 160>();
    const int lane = threadIdx.x & 31, wgroup = (threadIdx.x >> 7) - 1, warp = (threadIdx.x >> 5) - 4;
    const smem_t queries = q_at + wgroup * 64 * 128;
    const Mask mask = {window, scale, softcap};
    Turn key_turn, value_turn;
    // Barrier 1 + w: warpgroup w may issue. The first has its turn from the one that would come before it.
    if (TAKE_TURNS && wgroup == CONSUMERS - 1) named_arrive(1, 256);
    for (u32 query_parity = 0;; query_parity ^= 1) {
      barrier_wait(barriers.query_full(), query_parity);
      publish_shared();
      const int row = item.row, rows = item.rows, head = item.head, position = item.position, turns = item.tiles;
      int key0 = item.key0;
      if (turns == 0) break;
      const int end = item.end;
      const int group_first = position + wgroup * 64, lane_first = group_first + (warp & 3) * 16 + (lane >> 2);
      float o[HEAD_DIM / 8][4], s[KEY_TILE / 8][4] = {}, m[2] = {minus_infinity(), minus_infinity()}, l[2] = {0.f, 0.f}, alpha[2];
      u32 p[KEY_STEPS][4];
#pragma unroll
      for (int d = 0; d < HEAD_DIM / 8; d++) o[d][0] = o[d][1] = o[d][2] = o[d][3] = 0.f;

      barrier_wait(barriers.key_full(key_turn.stage), key_turn.parity);
      publish_loads();
      wgmma_fence();
      issue_scores(s, queries, k_at + key_turn.stage * TILE_BYTES);
      wgmma_wait<0>();
      wgmma_settle(s);
      if (lane == 0) barrier_arrive(barriers.key_empty(key_turn.stage));
      key_turn.next();
      softmax_tile(s, m, l, alpha, key0, lane_first, group_first, mask);
      pack_weights(p, s);
#if TMA
      if (end < key0 + KEY_TILE) {  // weights there are zero, but what the cache holds may be NaN
        barrier_wait(barriers.value_full(value_turn.stage), value_turn.parity);
        clear_rows(v_at + value_turn.stage * TILE_BYTES, end - key0);
        publish_shared();
        named_wait(CLEARED + wgroup, 128);
      }
#endif
      for (int turn = 1; turn < turns; turn++) {
        key0 -= KEY_TILE;
        barrier_wait(barriers.key_full(key_turn.stage), key_turn.parity);
        publish_loads();
        if (TAKE_TURNS) named_wait(1 + wgroup, 256);
        wgmma_settle(o);
        wgmma_fence();
        issue_scores(s, queries, k_at + key_turn.stage * TILE_BYTES);
        barrier_wait(barriers.value_full(value_turn.stage), value_turn.parity);
        publish_loads();
        wgmma_fence();
        issue_sum(o, p, v_at + value_turn.stage * TILE_BYTES);
        if (TAKE_TURNS) named_arrive(1 + (wgroup + 1) % CONSUMERS, 256);
        wgmma_wait<1>();
        wgmma_settle(s);
        if (lane == 0) barrier_arrive(barriers.key_empty(key_turn.stage));
        key_turn.next();
        const bool moved = softmax_tile(s, m, l, alpha, key0, lane_first, group_first, mask);
        wgmma_wait<0>();
        wgmma_settle(o);
        if (lane == 0) barrier_arrive(barriers.value_empty(value_turn.stage));
        value_turn.next();
        if (moved)
#pragma unroll
          for (int d = 0; d < HEAD_DIM / 8; d++) o[d][0] *= alpha[0], o[d][1] *= alpha[0], o[d][2] *= alpha[1], o[d][3] *= alpha[1];
        pack_weights(p, s);
      }
      if (lane == 0) barrier_arrive(barriers.query_empty());
      barrier_wait(barriers.value_full(value_turn.stage), value_turn.parity);
      publish_loads();
      wgmma_settle(o);
      wgmma_fence();
      issue_sum(o, p, v_at + value_turn.stage * TILE_BYTES);
      wgmma_wait<0>();
      wgmma_settle(o);
      if (lane == 0) barrier_arrive(barriers.value_empty(value_turn.stage));
      value_turn.next();

#pragma unroll
      for (int half = 0; half < 2; half++) {
        float sum = l[half];
        sum += __shfl_xor_sync(FULL_WARP, sum, 1);
        sum += __shfl_xor_sync(FULL_WARP, sum, 2);
        const float share = sum > 0.f ? 1.f / sum : 0.f;
        const int r = warp * 16 + half * 8 + (lane >> 2);
        bf16* to = out + ((u64)(row + r) * heads + head) * HEAD_DIM + (lane & 3) * 8;
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 8; d += 4) {
          u32 w[4];
#pragma unroll
          for (int j = 0; j < 4; j++) w[j] = pack_bf16(o[d + j][half * 2] * share, o[d + j][half * 2 + 1] * share);
          const u32x4 piece = gather_piece(w[0], w[1], w[2], w[3]);
          if (r < rows) *(u32x4*)(to + d * 8) = piece;
        }
      }
    }
  }
}
#undef BARRIERS
#undef CLEARED
#undef CHUNKS
#undef CONSUMERS
#undef KEY_STEPS
#undef KEY_TILE
#undef LAZY
#undef LOADERS
#undef LOAD_STEP
#undef NEXT_ITEM
#undef PANELS
#undef PROBE_NOFENCE
#undef PROBE_NOLOAD
#undef ROWS
#undef STAGES
#undef TAKE_TURNS
#undef TILE_BYTES
#undef TMA
