// y = x W^T for some dozens to hundreds of rows, on Hopper: where wide_linear.cu has too few tiles for all multiprocessors,
// the blocks of a cluster divide k among them.
//
//   split_{plain|gated}_m{ROWS}_n{COLUMNS}_s{S}     S blocks divide k
//   ..._rows_s{S}, ..._columns_s{S}                 pairs of row tiles share weights, pairs of column tiles share x
//
// plain, gated, operands, maps and what n and k are multiples of: as in wide_linear.cu. Boxes of x_map: ROWS rows
// (..._columns: half of them), of w_map COLUMNS / 2.
//
// A block computes ROWS rows by COLUMNS rows of w (gated: half of them of G, half of U) over its part of k. Its last warp
// brings 64 of k at a time into a ring, weights before the wait for the kernel before; two warpgroups multiply: 64 rows each,
// or where there are 64 in all, every second 64 of k. Then each block of the cluster gets its share of the rows' sums from
// all, through distributed shared memory, and finishes it.
// Grid: y = clusters, row tiles innermost; 288 threads. Dynamic shared memory: STAGES * (ROWS + COLUMNS) * 128 + 16 * STAGES
// + 1024 bytes.
// Expected: weights at 4 TB/s as long as x, n / COLUMNS times rows * k * 2 bytes out of L2, is no more than half of them;
// beyond 128 rows what the tensor cores give, about 90 % of 5.9 TFLOP/s a block, and 3 us for a cluster's exchange.

#define DEPTH 64  // of k at a time: a row of 128 bytes
#define THREADS 288
#define COMPUTING 256
#define ROOM 231168  // for the ring, of a block that has a multiprocessor to itself
#define LIGHT 108544  // of one that leaves room for the next kernel's

enum After { PLAIN, GATED };
enum Pairs { ALONE, ROW_PAIRS, COLUMN_PAIRS };

struct Product {
  const bf16 *bias, *residual;
  bf16* out;
  int rows, n, k;
};

template <After AFTER, int ROWS, int COLUMNS, Pairs PAIRS, int S> struct Split {
  static constexpr int WIDTH = AFTER == GATED ? COLUMNS / 2 : COLUMNS;  // of y
  static constexpr int MATES = PAIRS == ALONE ? 1 : 2, BLOCKS = MATES * S;
  static constexpr u32 X_BYTES = ROWS * DEPTH * 2, W_BYTES = COLUMNS * DEPTH * 2, STAGE_BYTES = X_BYTES + W_BYTES;
  static constexpr bool IS_LIGHT = COLUMNS <= 64;
  static constexpr int STAGES = (IS_LIGHT ? LIGHT : ROOM) / STAGE_BYTES;
  // Warpgroups that take turns at steps; otherwise each has rows of its own.
  static constexpr int TURNS = ROWS == 64 ? 2 : 1;
  static constexpr int PARTS = S * TURNS, OWN_ROWS = ROWS / S, STRIDE = COLUMNS + 16;
  static_assert(PARTS * OWN_ROWS * STRIDE * 4 <= STAGES * STAGE_BYTES);

  u8* parts;  // sums of this block's rows [PARTS][OWN_ROWS][STRIDE] f32, in the ring after the last step
  smem_t ring, full, empty;
  int part, mate, row, column, begin, steps;

  DEVICE Split(u8* shared, const Product& p) {
    const smem_t at = smem_address(shared), aligned = (at + 1023) / 1024 * 1024;
    parts = shared + (aligned - at), ring = aligned, full = ring + STAGES * STAGE_BYTES, empty = full + STAGES * 8;
    const int rank = BLOCKS > 1 ? cluster_rank() : 0, cluster = blockIdx.y / BLOCKS;
    part = rank / MATES, mate = rank % MATES;
    const int row_tiles = ceil_div(p.rows, ROWS * (PAIRS == ROW_PAIRS ? 2 : 1));
    const int row_tile = cluster % row_tiles, column_tile = cluster / row_tiles;
    row = (PAIRS == ROW_PAIRS ? row_tile * 2 + mate : row_tile) * ROWS;
    column = (PAIRS == COLUMN_PAIRS ? column_tile * 2 + mate : column_tile) * WIDTH;
    const int all = ceil_div(p.k, DEPTH), each = ceil_div(all, S);
    begin = part * each, steps = max(0, min(all - begin, each));
  }

  // This block's share of what a stage holds; that of its mate comes from there.
  DEVICE void copy_weights(int stage, int step, const TensorMap* map, const Product& p) const {
    const smem_t to = ring + stage * STAGE_BYTES + X_BYTES;
    const int k = (begin + step) * DEPTH, second = AFTER == GATED ? p.n + column : column + COLUMNS / 2;
    if (PAIRS == ROW_PAIRS) {
      copy_box_to_all(to + mate * (W_BYTES / 2), map, k, mate ? second : column, full + stage * 8, 3u << (part * MATES));
    } else {
      copy_box(to, map, k, column, full + stage * 8);
      copy_box(to + W_BYTES / 2, map, k, second, full + stage * 8);
    }
  }
  DEVICE void copy_rows(int stage, int step, const TensorMap* map) const {
    const smem_t to = ring + stage * STAGE_BYTES;
    const int k = (begin + step) * DEPTH, half = mate * (ROWS / 2);
    if (PAIRS == COLUMN_PAIRS) copy_box_to_all(to + half * 128, map, k, row + half, full + stage * 8, 3u << (part * MATES));
    else copy_box(to, map, k, row, full + stage * 8);
  }

  DEVICE void produce(const TensorMap* x_map, const TensorMap* w_map, const Product& p) const {
    const int first = min(STAGES, steps);
    for (int s = 0; s < first; s++) barrier_arrive_expect(full + s * 8, STAGE_BYTES), copy_weights(s, s, w_map, p);
    wait_for_previous_kernels();
    for (int s = 0; s < first; s++) copy_rows(s, s, x_map);
    int stage = 0;
    u32 parity = 0;
    for (int step = first; step < steps; step++) {
      barrier_wait(empty + stage * 8, parity);
      barrier_arrive_expect(full + stage * 8, STAGE_BYTES);
      copy_weights(stage, step, w_map, p), copy_rows(stage, step, x_map);
      if (++stage == STAGES) stage = 0, parity ^= 1;
    }
  }

  DEVICE void release(int stage) const {
    const int lane = threadIdx.x & 31;
    if (MATES == 1 && lane == 0) barrier_arrive(empty + stage * 8);
    if (MATES == 2 && lane < 2) barrier_arrive_in(empty + stage * 8, part * MATES + lane);
  }

  // Where a row's sums of one part lie. Rows eight apart would meet in a bank.
  DEVICE u32 place(int which, int r, int c) const {
    return ((which * OWN_ROWS + r % OWN_ROWS) * STRIDE + (c ^ (r & 8))) * 4;
  }

  DEVICE void meet() const {
    if (BLOCKS > 1) cluster_arrive(), cluster_wait();
    else named_wait(1, COMPUTING);
  }

  DEVICE void consume(const Product& p) const {
    // From the first lane: the same in all, so that descriptors need no registers of each.
    const int warp = __shfl_sync(FULL_WARP, threadIdx.x >> 5, 0), lane = threadIdx.x & 31, wgroup = warp >> 2;
    const tile_t x_tile = swizzled_tile(ring + (TURNS == 1 ? wgroup * 64 * 128 : 0), 1024, 16);
    const tile_t w_tile = swizzled_tile(ring + X_BYTES, 1024, 16);
    float d[COLUMNS / 8][4];
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j++) d[j][0] = d[j][1] = d[j][2] = d[j][3] = 0.f;
    int stage = TURNS == 1 ? 0 : wgroup, before = -1;
    u32 parity = 0;
    for (int step = stage; step < steps; step += TURNS) {
      const tile_t x = moved_tile(x_tile, stage * STAGE_BYTES), w = moved_tile(w_tile, stage * STAGE_BYTES);
      barrier_wait(full + stage * 8, parity);
      wgmma_settle(d);
      wgmma_fence();
#pragma unroll
      for (int s = 0; s < DEPTH / 16; s++) wgmma_shared(d, moved_tile(x, s * 32), moved_tile(w, s * 32), 1);
      wgmma_commit();
      wgmma_wait<1>();  // those of the step before are done: its stage may be filled again
      if (before >= 0) release(before);
      before = stage;
      stage += TURNS;
      if (stage >= STAGES) stage -= STAGES, parity ^= 1;
    }
    wgmma_wait<0>();
    wgmma_settle(d);
    wait_for_previous_kernels();
    meet();  // nobody needs the rings any more
    const int r = (TURNS == 1 ? wgroup * 64 : 0) + (warp & 3) * 16 + (lane >> 2) + (lane & 1) * 8;
    const int which = part * TURNS + (TURNS == 1 ? 0 : wgroup), owner = r / OWN_ROWS * MATES + mate;
    const bool odd = lane & 1;
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j++) {
      // A lane gets four columns of one row: it gives its neighbour what it has of the other.
      const float a = __shfl_xor_sync(FULL_WARP, odd ? d[j][0] : d[j][2], 1);
      const float b = __shfl_xor_sync(FULL_WARP, odd ? d[j][1] : d[j][3], 1);
      const smem_t to = ring + place(which, r, j * 8 + (lane & 2) * 2);
      if (row + r >= p.rows) continue;
      if (odd) store_in_cluster4(to, owner, a, b, d[j][2], d[j][3]);
      else store_in_cluster4(to, owner, d[j][0], d[j][1], a, b);
    }
    meet();
    finish(p);
  }

  DEVICE float4 total(int r, int c) const {
    float4 sum = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int s = 0; s < PARTS; s++) {
      const float4 v = *(const float4*)(parts + place(s, r, c));
      sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    return sum;
  }

  DEVICE void finish(const Product& p) const {
    constexpr int ACROSS = WIDTH / 4;
#pragma unroll 2
    for (int i = threadIdx.x; i < OWN_ROWS * ACROSS; i += COMPUTING) {
      const int r = part * OWN_ROWS + i / ACROSS, c = i % ACROSS * 4;
      if (row + r >= p.rows || column + c >= p.n) continue;
      const u64 at = (u64)(row + r) * p.n + column + c;
      const float4 sum = total(r, c);
      u32x2 y;
      if (AFTER == GATED) {
        const float4 up = total(r, c + WIDTH);
        const float gates[4] = {sum.x, sum.y, sum.z, sum.w}, ups[4] = {up.x, up.y, up.z, up.w};
        y = {{gate_pair(gates, ups), gate_pair(gates + 2, ups + 2)}};
      } else {
        u32x2 bias = {{0, 0}}, more = {{0, 0}};
        if (p.bias) bias = *(const u32x2*)(p.bias + column + c);
        if (p.residual) more = load_stream8(p.residual + at);
        y.r[0] = pack_bf16(sum.x + low_bf16(bias.r[0]) + low_bf16(more.r[0]), sum.y + high_bf16(bias.r[0]) + high_bf16(more.r[0]));
        y.r[1] = pack_bf16(sum.z + low_bf16(bias.r[1]) + low_bf16(more.r[1]), sum.w + high_bf16(bias.r[1]) + high_bf16(more.r[1]));
      }
      *(u32x2*)(p.out + at) = y;
    }
  }

  DEVICE void run(const TensorMap* x_map, const TensorMap* w_map, const Product& p) const {
    if (threadIdx.x == COMPUTING) {
      for (int s = 0; s < STAGES; s++) {
        barrier_init(full + s * 8, 1);
        barrier_init(empty + s * 8, (TURNS == 1 ? 8 : 4) * MATES);  // every warp that reads it
      }
      publish_barriers();
    }
    __syncthreads();
    if (BLOCKS > 1) cluster_arrive(), cluster_wait();
    if (threadIdx.x >= COMPUTING) {
      if (threadIdx.x == COMPUTING) produce(x_map, w_map, p);
      __syncwarp();
      if (BLOCKS > 1) meet(), meet();
    } else {
      consume(p);
    }
  }
};

#define SPLIT(NAME, AFTER, ROWS, COLUMNS, PAIRS, S)                                                                          \
  KERNEL void __launch_bounds__(THREADS, Split<AFTER COMMA ROWS COMMA COLUMNS COMMA PAIRS COMMA S>::IS_LIGHT ? 2 : 1)        \
  NAME(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, const bf16* __restrict__ bias,      \
       const bf16* residual, bf16* out, int rows, int n, int k) {                                                            \
    DYNAMIC_SHARED(shared);                                                                                                  \
    let_next_kernel_start();                                                                                                 \
    const Product p = {bias, residual, out, rows, n, k};                                                                     \
    Split<AFTER, ROWS, COLUMNS, PAIRS, S>(shared, p).run(&x_map, &w_map, p);                                                 \
  }
#define COMMA ,
SPLIT(split_gated_m128_n256_columns_s1, GATED, 128, 256, COLUMN_PAIRS, 1)
SPLIT(split_gated_m128_n128_columns_s1, GATED, 128, 128, COLUMN_PAIRS, 1)
SPLIT(split_gated_m64_n256_s1, GATED, 64, 256, ALONE, 1)
SPLIT(split_gated_m64_n64_s1, GATED, 64, 64, ALONE, 1)
SPLIT(split_plain_m128_n256_rows_s4, PLAIN, 128, 256, ROW_PAIRS, 4)
SPLIT(split_plain_m128_n192_rows_s2, PLAIN, 128, 192, ROW_PAIRS, 2)
SPLIT(split_plain_m128_n256_rows_s2, PLAIN, 128, 256, ROW_PAIRS, 2)
SPLIT(split_plain_m128_n128_rows_s2, PLAIN, 128, 128, ROW_PAIRS, 2)
SPLIT(split_plain_m128_n192_columns_s4, PLAIN, 128, 192, COLUMN_PAIRS, 4)
SPLIT(split_plain_m128_n128_s4, PLAIN, 128, 128, ALONE, 4)
SPLIT(split_plain_m64_n256_s8, PLAIN, 64, 256, ALONE, 8)
SPLIT(split_plain_m64_n192_s4, PLAIN, 64, 192, ALONE, 4)
SPLIT(split_plain_m64_n64_s8, PLAIN, 64, 64, ALONE, 8)
SPLIT(split_plain_m64_n64_s4, PLAIN, 64, 64, ALONE, 4)

#undef COMMA
#undef COMPUTING
#undef DEPTH
#undef LIGHT
#undef ROOM
#undef SPLIT
#undef THREADS
