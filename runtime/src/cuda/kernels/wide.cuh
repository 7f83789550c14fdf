// What products of many rows on Hopper have in common: tensor cores fed by the copy engine. Precedes wide_linear.cu,
// wide_rotated.cu and wide_head.cu, after wgmma.cuh.
//
// x [rows, k], w [n or 2 n, k], bf16; sums in f32. k a multiple of 8, any number of rows.
// x_map, w_map: boxes of 128 rows (of w: COLUMNS / 2) of 64 columns, zeros beyond the edges.
//
// Grid: y = blocks, as many as multiprocessors, in clusters of two; 384 threads. A block computes tiles of 128 rows by
// COLUMNS rows of w (of gated products half of them of the gates, half of the ups: a thread has both of an element), one
// after the other. Its first warp brings 64 of k at a time into a ring; two warpgroups, 64 rows each, multiply. The two
// blocks of a cluster have the same columns: each brings half of w's rows for both. BESIDE, for up to 128 rows: they have the
// same rows and columns beside one another; each brings half of x (boxes of 64 rows) for both. The second warpgroup begins LAG steps
// after the first, and so the end of a tile of one runs beside products of the other: 2 % less in short runs of 28,672 x
// 4,096, nothing in long ones, where the card's power decides.
//
// What becomes of the sums is a Result's matter: rows, n, k; GATED: w has 2 n rows; finish(d, own, row, column, kept): the
// calling warp's 16 rows from `row` on, sums in d as wgmma leaves them, `own` 4,096 bytes of shared memory, `kept` what a
// warp keeps from tile to tile. Where it is EARLY, begin(row, column, kept) before a tile's products and
// near_end(column, kept) while the last of them run load what finish wants.

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

// What both sides know of the work: which tiles there are, and where the ring and its barriers lie.
template <class Result, int COLUMNS, bool BESIDE> struct Work {
  static constexpr int WIDTH = Result::GATED ? COLUMNS / 2 : COLUMNS;  // of y
  static constexpr u32 W_BYTES = COLUMNS * DEPTH * 2, STAGE_BYTES = X_BYTES + W_BYTES;
  int row_tiles, column_tiles, rank;
  smem_t ring, outs, full, empty, begun;

  DEVICE Work(smem_t at, const Result& p) : ring(at) {
    row_tiles = ceil_div(p.rows, BLOCK_ROWS * (BESIDE ? 1 : CLUSTER)), rank = cluster_rank();
    column_tiles = ceil_div(p.n, WIDTH * (BESIDE ? CLUSTER : 1));
    outs = ring + STAGES * STAGE_BYTES, full = outs + 8 * WARP_OUT_BYTES, empty = full + STAGES * 8;
    begun = empty + STAGES * 8;
  }
  DEVICE int tiles() const { return row_tiles * column_tiles; }
  // First row and first column of this block's part of a tile.
  DEVICE void locate(int tile, int& row, int& column) const {
    const int group = tile / (GROUP * column_tiles), first = group * GROUP, height = min(GROUP, row_tiles - first);
    const int rest = tile - first * column_tiles;
    row = first + rest % height, column = rest / height;
    if (BESIDE) column = column * CLUSTER + rank;
    else row = row * CLUSTER + rank;
    row *= BLOCK_ROWS, column *= WIDTH;
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

template <class Result, int COLUMNS, bool BESIDE>
DEVICE void produce(const Work<Result, COLUMNS, BESIDE>& work, const TensorMap* x_map, const TensorMap* w_map, const Result& p) {
  constexpr int HALF = COLUMNS / 2;
  Place place = {0, 1};
  for (int tile = blockIdx.y / CLUSTER; tile < work.tiles(); tile += gridDim.y / CLUSTER) {
    int row, column;
    work.locate(tile, row, column);
    const int w_row = work.rank == 0 ? column : Result::GATED ? p.n + column : column + HALF;
    for (int k = 0; k < p.k; k += DEPTH, place.next()) {
      const smem_t x = work.ring + place.stage * work.STAGE_BYTES, w = x + X_BYTES;
      const smem_t full = work.full + place.stage * 8;
      barrier_wait(work.empty + place.stage * 8, place.parity);
      barrier_arrive_expect(full, work.STAGE_BYTES);
      if (BESIDE) {
        copy_box_to_all(x + work.rank * (X_BYTES / 2), x_map, k, row + work.rank * (BLOCK_ROWS / 2), full, 3);
        copy_box(w, w_map, k, column, full);
        copy_box(w + work.W_BYTES / 2, w_map, k, column + HALF, full);
      } else {
        copy_box(x, x_map, k, row, full);
        copy_box_to_all(w + work.rank * (work.W_BYTES / 2), w_map, k, w_row, full, 3);
      }
    }
  }
}

template <class Result, int COLUMNS, bool BESIDE> DEVICE void consume(const Work<Result, COLUMNS, BESIDE>& work, const Result& p) {
  // From the first lane: the same in all, so that descriptors need no registers of each.
  const int warp = __shfl_sync(FULL_WARP, threadIdx.x >> 5, 0) - 4, lane = threadIdx.x & 31;
  const tile_t x_tile = swizzled_tile(work.ring + (warp >> 2) * (X_BYTES / 2), 1024, 16);
  const tile_t w_tile = swizzled_tile(work.ring + X_BYTES, 1024, 16);
  const smem_t own = work.outs + warp * WARP_OUT_BYTES;
  Place place = {0, 0};
  float d[COLUMNS / 8][4];
  typename Result::Kept kept;
  int ahead = LAG;  // steps that the first warpgroup still takes alone
  for (int tile = blockIdx.y / CLUSTER; tile < work.tiles(); tile += gridDim.y / CLUSTER) {
    smem_t before = 0;
    int row, column;
    if constexpr (Result::EARLY) work.locate(tile, row, column), p.begin(row + warp * 16, column, kept);
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
    if constexpr (Result::EARLY) p.near_end(column, kept);
    wgmma_wait<0>();
    wgmma_settle(d);
    if (lane < CLUSTER) barrier_arrive_in(before, lane);
    if constexpr (!Result::EARLY) work.locate(tile, row, column);
    if (!BESIDE || column < p.n) p.finish(d, own, row + warp * 16, column, kept);
  }
}

template <class Result, int COLUMNS, bool BESIDE = false> DEVICE void multiply(const TensorMap* x_map, const TensorMap* w_map, const Result& p) {
  DYNAMIC_SHARED(shared);
  let_next_kernel_start();
  const Work<Result, COLUMNS, BESIDE> work((smem_address(shared) + 1023) / 1024 * 1024, p);
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
