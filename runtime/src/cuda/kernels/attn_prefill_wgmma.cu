// Paged causal attention of prefill chunks with Hopper's warpgroup products: what attn_prefill.cu does, with the same
// arguments and results, for head_dim 64 and 128 on sm_90a.
//
// Here keys and values come as tensor maps of the caches, not as the caches themselves (see tensor_map.rs).
// Grid: as many blocks as multiprocessors, or fewer for fewer items; an item is 128 rows of one head, heads * tiles of them,
// tiles being the sum over sequences of ceil(rows / 128), or more. 3 * 128 threads. Dynamic shared memory:
// (128 + 4 * 128) * HEAD_DIM * 2 + 1024 bytes. One launch of a module at a time: blocks share a counter.
//
// A block takes items one after another, the longest first, as it gets free. One warpgroup brings in Q (cp.async) and K and V
// (the copy engine, a box of 16 tokens and 64 columns at a time), ahead of and across items, in the swizzled layout that
// wgmma reads; two of 64 queries each compute. These issue the scores of the next tile before the sum over the tile at hand,
// so that the softmax runs beside the products (FlashAttention 3, section 3.2). The maximum that weights are relative to
// follows only jumps of more than 2^8: o is hardly ever rescaled, and nothing overflows.
// Expected: flops, 4 * HEAD_DIM * heads * (query, key) pairs. On an H200 623 TFLOP/s at 8,192 tokens and head_dim 128, 438 at
// 32 x 1,024; at head_dim 64, where the exponentials take as long as the products, 428 and 278. Look for the compiler's
// remark C7512 (products serialised; kernel_check's -DSPIN_LIMIT brings it about) and for spills before a figure is believed.

#define STAGES 2
#define CONSUMERS 2
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

// Named barriers; the second is one for each warpgroup that computes.
#define NEXT_ITEM 1
#define CLEARED 2

template <bool VALUE> struct Choice {
  static constexpr bool value = VALUE;
};
struct Mask {
  int window;
  float scale, softcap;
};

// Scores of one tile to weights, in place; the running maximum and sum move on. alpha: what o must be multiplied by. Whether
// that is not 1 for any row of this warp. MASKED: with what the loop over tiles in the past of all rows need not carry along.
template <bool MASKED>
DEVICE bool softmax_tile(float (&s)[KEY_TILE / 8][4], float (&m)[2], float (&l)[2], float (&alpha)[2], int key0, int lane_first,
                         int group_first, const Mask& mask) {
  const int lane = threadIdx.x & 31;
  const float factor = MASKED && mask.softcap > 0.f ? LOG2E : mask.scale * LOG2E;
  bool moved = false;
  if (MASKED && mask.softcap > 0.f) {
#pragma unroll
    for (int n = 0; n < KEY_TILE / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) s[n][e] = soft_cap(s[n][e] * mask.scale, mask.softcap);
  }
  if (MASKED && (key0 + KEY_TILE - 1 > group_first || (mask.window > 0 && key0 <= group_first + 63 - mask.window))) {
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
    most = (most - m[half]) * factor > 8.f ? most : m[half];  // while nothing was seen, m is -inf: inf > 8
    moved |= most != m[half];
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
  return __ballot_sync(FULL_WARP, moved) != 0;
}

DEVICE void issue_scores(float (&s)[KEY_TILE / 8][4], smem_t queries, smem_t keys) {
  const tile_t q = swizzled_tile(queries, 1024, 16), k_tile = swizzled_tile(keys, 1024, 16);
#pragma unroll
  for (int k = 0; k < HEAD_DIM / 16; k++)
    wgmma_shared(s, moved_tile(q, (k >> 2) * ROWS * 128 + (k & 3) * 32),
                 moved_tile(k_tile, (k >> 2) * KEY_TILE * 128 + (k & 3) * 32), k > 0);
  wgmma_commit();
}

DEVICE void issue_sum(float (&o)[HEAD_DIM / 8][4], const u32 (&p)[KEY_STEPS][4], smem_t values) {
  const tile_t v = swizzled_tile(values, 1024, KEY_TILE * 128);
#pragma unroll
  for (int k = 0; k < KEY_STEPS; k++) wgmma_registers(o, p[k], moved_tile(v, k * 2048));
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
      barrier_init(barriers.key_full(i), 1), barrier_init(barriers.value_full(i), 1);
      barrier_init(barriers.key_empty(i), 4 * CONSUMERS), barrier_init(barriers.value_empty(i), 4 * CONSUMERS);
    }
    publish_shared();
  }
  __syncthreads();
  let_next_kernel_start();
  wait_for_previous_kernels();
  const smem_t q_at = (smem_address(shared) + 1023) / 1024 * 1024, k_at = q_at + ROWS * HEAD_DIM * 2;
  const smem_t v_at = k_at + STAGES * TILE_BYTES;

  if (threadIdx.x < LOADERS) {
    fewer_registers<40>();
    Turn key_turn, value_turn;
    u32 query_parity = 1;
    const int items = heads * tiles, lane = threadIdx.x & 31;
    const bool copier = threadIdx.x < 32;  // its lanes have the copy engine fetch K and V; all fetch Q
    if (copier) acquire_map(key_map), acquire_map(value_map);
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
        // A lane has a box of a tile: 16 keys, 64 columns.
        const int box = lane / PANELS, panel = lane % PANELS;
        const auto block_at = [&](int key) { return lane < KEY_STEPS * PANELS && key + box * 16 < end ? table[(key >> 4) + box] : -1; };
        const auto load = [&](smem_t to, const TensorMap* map, int key, int block, smem_t full, smem_t empty, u32 parity) {
          barrier_wait(empty, parity ^ 1);
          if (lane == 0) barrier_arrive_expect(full, min(KEY_STEPS, ceil_div(end - key, 16)) * (16 * HEAD_DIM * 2));
          __syncwarp();
          if (block >= 0) copy_box(to + panel * (KEY_TILE * 128) + box * 2048, map, panel * 64, (block * kv_heads + kv_head) * 16, full);
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
        if (copier) load_keys(key0, block);
        barrier_wait(barriers.query_empty(), query_parity);
        query_parity ^= 1;
        load_queries(q_at, qkv + (u64)(row_begin + tile.row) * q_stride + head * HEAD_DIM, q_stride, rows - tile.row);
        barrier_arrive_after_copies(barriers.query_full());
        if (threadIdx.x == 0) {
          item = {row_begin + tile.row, rows - tile.row, head, position, key0, (key0 - key_begin) / KEY_TILE + 1, end};
          barrier_arrive(barriers.query_full());
        }
        if (copier) {
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
    more_registers<232>();
    const int lane = threadIdx.x & 31, wgroup = (threadIdx.x >> 7) - 1, warp = (threadIdx.x >> 5) - 4;
    const smem_t queries = q_at + wgroup * 64 * 128;
    const Mask mask = {window, scale, softcap};
    Turn key_turn, value_turn;
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
      wgmma_fence();
      issue_scores(s, queries, k_at + key_turn.stage * TILE_BYTES);
      wgmma_wait<0>();
      wgmma_settle(s);
      if (lane == 0) barrier_arrive(barriers.key_empty(key_turn.stage));
      key_turn.next();
      softmax_tile<true>(s, m, l, alpha, key0, lane_first, group_first, mask);
      pack_weights(p, s);
      if (end < key0 + KEY_TILE) {  // weights there are zero, but what the cache holds may be NaN
        barrier_wait(barriers.value_full(value_turn.stage), value_turn.parity);
        clear_rows(v_at + value_turn.stage * TILE_BYTES, end - key0);
        publish_shared();
        named_wait(CLEARED + wgroup, 128);
      }
      if (turns > 1) barrier_wait(barriers.key_full(key_turn.stage), key_turn.parity);
      int turn = 1;
      const auto next_tile = [&](auto masked) {
        key0 -= KEY_TILE;
        wgmma_settle(o);
        wgmma_fence();
        issue_scores(s, queries, k_at + key_turn.stage * TILE_BYTES);
        barrier_wait(barriers.value_full(value_turn.stage), value_turn.parity);
        wgmma_fence();
        issue_sum(o, p, v_at + value_turn.stage * TILE_BYTES);
        wgmma_wait<1>();
        wgmma_settle(s);
        if (lane == 0) barrier_arrive(barriers.key_empty(key_turn.stage));
        key_turn.next();
        const bool moved = softmax_tile<decltype(masked)::value>(s, m, l, alpha, key0, lane_first, group_first, mask);
        wgmma_settle(s);
        // Here because the assembler moves the wait below up to where the path last branched, before the softmax.
        if (turn + 1 < turns) barrier_wait(barriers.key_full(key_turn.stage), key_turn.parity);
        wgmma_wait<0>();
        wgmma_settle(o);
        if (lane == 0) barrier_arrive(barriers.value_empty(value_turn.stage));
        value_turn.next();
        if (moved)
#pragma unroll
          for (int d = 0; d < HEAD_DIM / 8; d++) o[d][0] *= alpha[0], o[d][1] *= alpha[0], o[d][2] *= alpha[1], o[d][3] *= alpha[1];
        pack_weights(p, s);
      };
      const bool all_masked = mask.window > 0 || mask.softcap > 0.f;
      for (; turn < turns && (all_masked || key0 > group_first + 1); turn++) next_tile(Choice<true>());
      for (; turn < turns; turn++) next_tile(Choice<false>());
      if (lane == 0) barrier_arrive(barriers.query_empty());
      barrier_wait(barriers.value_full(value_turn.stage), value_turn.parity);
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
#undef LOADERS
#undef LOAD_STEP
#undef NEXT_ITEM
#undef PANELS
#undef ROWS
#undef STAGES
#undef TILE_BYTES
