// y = x W^T for many rows, on Hopper: tensor cores fed by the copy engine.
//
//   wide_gated_n256, _n224   y = silu(x G^T) * (x U^T)     w rows: n of G, then n of U
//   wide_plain_n256, _n192   y = x W^T (+ bias) (+ residual)
//
// x [rows, k], w [n or 2 n, k], bias [n], residual and y [rows, n], all bf16; sums in f32, rounded once. n and k multiples
// of 8, any number of rows. bias and residual may be null; residual may be y.
// x_map, w_map: boxes of 128 rows (of w: COLUMNS / 2) of 64 columns, zeros beyond the edges.
//
// Grid: y = blocks, as many as multiprocessors, in clusters of two; 384 threads. A block computes tiles of 128 rows by
// COLUMNS rows of w (half of them of G, half of U: a thread has gate and up of an element), one after the other. Its first
// warp brings 64 of k at a time into a ring; two warpgroups, 64 rows each, multiply. The two blocks of a cluster have the
// same columns: each brings half of w's rows for both. The second warpgroup begins LAG steps after the first, and so the
// end of a tile of one runs beside products of the other: 2 % less in short runs of 28,672 x 4,096, nothing in long ones,
// where the card's power decides.
// Expected: 64 of k take 1,024 cycles, which is what the tensor cores need, and a tile's end 2,600: at 8,192 rows, as the
// card's power allows, 700 TFLOP/s over 28,672 x 4,096 with the gate, and 650 over 9,728 x 896: cuBLASLt's without it.

#define BLOCK_ROWS 128
#define DEPTH 64  // of k at a time: a row of 128 bytes
#define CLUSTER 2
#define STAGES 4
#ifndef GROUP
#define GROUP 8  // pairs of row tiles that take a column together: few rows and few weights are under way at once
#endif
#ifndef LAG
#define LAG 2  // fewer than STAGES
#endif
#define THREADS 384
#define X_BYTES (BLOCK_ROWS * DEPTH * 2)
#define WARP_OUT_BYTES 4096

enum After { PLAIN, GATED };

struct Product {
  const bf16 *bias, *residual;
  bf16* out;
  int rows, n, k;
};

// What both sides know of the work: which tiles there are, and where the ring and its barriers lie.
template <After AFTER, int COLUMNS> struct Work {
  static constexpr int WIDTH = AFTER == GATED ? COLUMNS / 2 : COLUMNS;  // of y
  static constexpr u32 W_BYTES = COLUMNS * DEPTH * 2, STAGE_BYTES = X_BYTES + W_BYTES;
  int row_tiles, column_tiles, rank;
  smem_t ring, outs, full, empty, begun;

  DEVICE Work(smem_t at, const Product& p) : ring(at) {
    row_tiles = ceil_div(p.rows, BLOCK_ROWS * CLUSTER), column_tiles = ceil_div(p.n, WIDTH), rank = cluster_rank();
    outs = ring + STAGES * STAGE_BYTES, full = outs + 8 * WARP_OUT_BYTES, empty = full + STAGES * 8;
    begun = empty + STAGES * 8;
  }
  DEVICE int tiles() const { return row_tiles * column_tiles; }
  // First row and first column of this block's part of a tile.
  DEVICE void locate(int tile, int& row, int& column) const {
    const int group = tile / (GROUP * column_tiles), first = group * GROUP, height = min(GROUP, row_tiles - first);
    const int rest = tile - first * column_tiles;
    row = ((first + rest % height) * CLUSTER + rank) * BLOCK_ROWS, column = rest / height * WIDTH;
  }
};

// Place in the ring. The parity is that of the phase to wait for.
struct Place {
  int stage;
  u32 parity;
  DEVICE void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

template <After AFTER, int COLUMNS>
DEVICE void produce(const Work<AFTER, COLUMNS>& work, const TensorMap* x_map, const TensorMap* w_map, const Product& p) {
  constexpr int HALF = COLUMNS / 2;
  Place place = {0, 1};
  for (int tile = blockIdx.y / CLUSTER; tile < work.tiles(); tile += gridDim.y / CLUSTER) {
    int row, column;
    work.locate(tile, row, column);
    const int w_row = work.rank == 0 ? column : AFTER == GATED ? p.n + column : column + HALF;
    for (int k = 0; k < p.k; k += DEPTH, place.next()) {
      const smem_t x = work.ring + place.stage * work.STAGE_BYTES, w = x + X_BYTES + work.rank * (work.W_BYTES / 2);
      const smem_t full = work.full + place.stage * 8;
      barrier_wait(work.empty + place.stage * 8, place.parity);
      barrier_arrive_expect(full, work.STAGE_BYTES);
      copy_box(x, x_map, k, row, full);
      copy_box_to_all(w, w_map, k, w_row, full, 3);
    }
  }
}

// 16 rows of up to 128 columns, a warp's own: piece c of row r at piece c ^ (r % 8).
DEVICE smem_t piece(smem_t at, int r, int c) { return at + r * 256 + ((c ^ (r & 7)) << 4); }

// The warp's 16 rows from shared memory to y at `row` and `column`.
template <int PIECES> DEVICE void write_rows(smem_t from, const Product& p, int row, int column) {
  const int lane = threadIdx.x & 31, c = lane & 15;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const int r = i * 2 + (lane >> 4);
    const u32x4 v = load_shared16(piece(from, r, c));
    if (c < PIECES && row + r < p.rows && column + c * 8 < p.n) *(u32x4*)(p.out + (u64)(row + r) * p.n + column + c * 8) = v;
  }
  __syncwarp();
}

template <int TILES> DEVICE void finish_gated(const float (&d)[TILES][4], smem_t own, const Product& p, int row, int column) {
  constexpr int HALF = TILES / 2;
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int j = 0; j < HALF; j += 2) {
    u32 v[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int tile = j + (i >> 1), at = (i & 1) * 2;
      v[i] = gate_pair(&d[tile][at], &d[HALF + tile][at]);
    }
    stmatrix_x4(piece(own, lane & 15, j + (lane >> 4)), v);
  }
  write_rows<HALF>(own, p, row, column);
}

// Half of the columns: d from FIRST on.
template <int FIRST, int TILES> DEVICE void finish_plain(const float (&d)[TILES][4], smem_t own, const Product& p, int row, int column) {
  constexpr int HALF = TILES / 2;
  const int lane = threadIdx.x & 31;
  if (p.residual) {
    u32x4 v[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int r = i * 2 + (lane >> 4), c = lane & 15;
      const bool valid = c < HALF && row + r < p.rows && column + c * 8 < p.n;
      v[i] = load_stream(p.residual + (valid ? (u64)(row + r) * p.n + column + c * 8 : 0));
    }
#pragma unroll
    for (int i = 0; i < 8; i++) store_shared16(piece(own, i * 2 + (lane >> 4), lane & 15), v[i]);
    __syncwarp();
  }
#pragma unroll
  for (int j = 0; j < HALF; j += 2) {
    const smem_t at = piece(own, lane & 15, j + (lane >> 4));
    u32 more[4] = {0, 0, 0, 0}, v[4];
    if (p.residual) ldmatrix_x4(more, at);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float* sum = &d[FIRST + j + (i >> 1)][(i & 1) * 2];
      const int c = column + (j + (i >> 1)) * 8 + (lane & 3) * 2;
      const u32 bias = p.bias && c < p.n ? *(const u32*)(p.bias + c) : 0;
      v[i] = pack_bf16(sum[0] + low_bf16(bias) + low_bf16(more[i]), sum[1] + high_bf16(bias) + high_bf16(more[i]));
    }
    stmatrix_x4(at, v);
  }
  write_rows<HALF>(own, p, row, column);
}

template <After AFTER, int COLUMNS> DEVICE void consume(const Work<AFTER, COLUMNS>& work, const Product& p) {
  // From the first lane: the same in all, so that descriptors need no registers of each.
  const int warp = __shfl_sync(FULL_WARP, threadIdx.x >> 5, 0) - 4, lane = threadIdx.x & 31;
  const tile_t x_tile = swizzled_tile(work.ring + (warp >> 2) * (X_BYTES / 2), 1024, 16);
  const tile_t w_tile = swizzled_tile(work.ring + X_BYTES, 1024, 16);
  const smem_t own = work.outs + warp * WARP_OUT_BYTES;
  Place place = {0, 0};
  float d[COLUMNS / 8][4];
  int ahead = LAG;  // steps that the first warpgroup still takes alone
  for (int tile = blockIdx.y / CLUSTER; tile < work.tiles(); tile += gridDim.y / CLUSTER) {
    smem_t before = 0;
    if (ahead > 0 && warp >= 4) barrier_wait(work.begun, 0), ahead = 0;
    for (int k = 0; k < p.k; k += DEPTH, place.next()) {
      const u32 stage = place.stage * work.STAGE_BYTES;
      const tile_t x = moved_tile(x_tile, stage), w = moved_tile(w_tile, stage);
      barrier_wait(work.full + place.stage * 8, place.parity);
      wgmma_settle(d);
      wgmma_fence();
#pragma unroll
      for (int s = 0; s < DEPTH / 16; s++) wgmma_shared(d, moved_tile(x, s * 32), moved_tile(w, s * 32), s > 0 || k > 0);
      wgmma_commit();
      if (ahead > 0 && (--ahead == 0 || k + DEPTH >= p.k)) {
        ahead = 0;
        if (threadIdx.x == 128) barrier_arrive(work.begun);
      }
      wgmma_wait<1>();  // those of the stage before are done: both blocks may fill it again
      if (before && lane < CLUSTER) barrier_arrive_in(before, lane);
      before = work.empty + place.stage * 8;
    }
    wgmma_wait<0>();
    wgmma_settle(d);
    if (lane < CLUSTER) barrier_arrive_in(before, lane);
    int row, column;
    work.locate(tile, row, column);
    row += warp * 16;
    if (AFTER == GATED) {
      finish_gated(d, own, p, row, column);
    } else {
      finish_plain<0>(d, own, p, row, column);
      finish_plain<COLUMNS / 16>(d, own, p, row, column + COLUMNS / 2);
    }
  }
}

template <After AFTER, int COLUMNS> DEVICE void multiply(const TensorMap* x_map, const TensorMap* w_map, const Product& p) {
  DYNAMIC_SHARED(shared);
  let_next_kernel_start();
  const Work<AFTER, COLUMNS> work((smem_address(shared) + 1023) / 1024 * 1024, p);
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(work.full + s * 8, 1);
      barrier_init(work.empty + s * 8, 8 * CLUSTER);  // every multiplying warp of both
    }
    barrier_init(work.begun, 1);
    publish_barriers();
  }
  __syncthreads();
  cluster_arrive();
  cluster_wait();
  wait_for_previous_kernels();
  if (threadIdx.x < 128) {
    fewer_registers<24>();
    if (threadIdx.x == 0) produce(work, x_map, w_map, p);
    __syncwarp();
  } else {
    more_registers<240>();
    consume(work, p);
  }
  // Nobody leaves while the other may still arrive at its barriers.
  cluster_arrive();
  cluster_wait();
}

#define WIDE(NAME, AFTER, COLUMNS)                                                                                           \
  KERNEL void __launch_bounds__(THREADS, 1)                                                                                  \
  NAME(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, const bf16* __restrict__ bias,      \
       const bf16* residual, bf16* out, int rows, int n, int k) {                                                            \
    multiply<AFTER, COLUMNS>(&x_map, &w_map, {bias, residual, out, rows, n, k});                                             \
  }
WIDE(wide_gated_n256, GATED, 256)
WIDE(wide_gated_n224, GATED, 224)
WIDE(wide_plain_n256, PLAIN, 256)
WIDE(wide_plain_n192, PLAIN, 192)

#undef BLOCK_ROWS
#undef CLUSTER
#undef DEPTH
#undef GROUP
#undef LAG
#undef STAGES
#undef THREADS
#undef WARP_OUT_BYTES
#undef WIDE
#undef X_BYTES
