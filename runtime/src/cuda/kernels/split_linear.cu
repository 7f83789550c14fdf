// y = x W^T for some dozens of rows, on Hopper: tiles by the copy engine, warpgroup products, and what surrounds them.
//
//   split_plain_s{S}   y = x W^T (+ bias) (+ residual); clusters of S blocks divide k
//   split_gated        y = silu(x G^T) * (x U^T); w rows: n of G, then n of U
//
// x [rows, k], w [n or 2 n, k], bias [n], residual and y [rows, n], all bf16; sums in f32. n a multiple of 8, k too; any
// number of rows, by tiles of 64. bias and residual may be null; residual may be y.
// x_map: boxes of 64 rows of 64 columns, w_map: 32 rows; zeros beyond the edges.
//
// A block computes 64 rows by 64 rows of w (gated: half of them of G, half of U) over its part of k. Its last warp
// brings 64 of k at a time into a ring, weights before the wait for the kernel before; two warpgroups take turns at them.
// Each block of a cluster then gets its share of the rows' sums from all, through distributed shared memory.
// Grid: y = clusters, row tiles innermost; 288 threads; dynamic shared memory: see wide.rs.
// Expected: 64 rows on an H200: 9,728 x 896 gated 6.8 us (cuBLASLt and the gate behind it 8.3), 896 x 4,864 7.4 (7.6),
// 896 x 896 3.7 (3.9); bytes of weights would take 4.0, 2.0 and 0.4, the rest is what cannot overlap: the first tile of x,
// the cluster's exchange. Pairs of column tiles that share x by multicast took 8.3 us, the norm inside the product 10.

#define DEPTH 64  // of k at a time: a row of 128 bytes
#define THREADS 288
#define COMPUTING 256
#define ROWS 64     // of x
#define COLUMNS 64  // rows of w
#define ROOM 114688  // shared memory that leaves room for the next kernel's block

enum After { PLAIN, GATED };

struct Product {
  const bf16 *bias, *residual;
  bf16* out;
  int rows, n, k;
};

// S: blocks of a cluster, which divide k.
template <After AFTER, int S> struct Split {
  static constexpr bool IS_GATED = AFTER == GATED;
  static constexpr int WIDTH = IS_GATED ? COLUMNS / 2 : COLUMNS;  // of y
  static constexpr u32 X_BYTES = ROWS * DEPTH * 2, W_BYTES = COLUMNS * DEPTH * 2, STAGE_BYTES = X_BYTES + W_BYTES;
  static constexpr int PARTS = 2 * S, OWN_ROWS = ROWS / S, STRIDE = COLUMNS + 16;
  static constexpr u32 PARTS_BYTES = PARTS * OWN_ROWS * STRIDE * 4;
  // Between blocks the sums have a place of their own, so that nobody need wait for another's last step.
  static constexpr u32 APART_BYTES = S > 1 ? PARTS_BYTES : 0;
  static constexpr int STAGES = (ROOM - 2048 - APART_BYTES) / STAGE_BYTES;
  static constexpr int EACH = (OWN_ROWS * WIDTH / 4 + COMPUTING - 1) / COMPUTING;  // pieces of four columns a thread finishes
  static_assert(S > 1 || PARTS_BYTES <= STAGES * STAGE_BYTES);

  u8* parts;  // sums of this block's rows [PARTS][OWN_ROWS][STRIDE] f32
  smem_t ring, parts_at, full, empty;
  int rank, row, column, begin, steps;

  DEVICE Split(u8* shared, const Product& p) {
    const smem_t at = smem_address(shared), aligned = (at + 1023) / 1024 * 1024;
    ring = aligned, parts_at = S > 1 ? ring + STAGES * STAGE_BYTES : ring;
    parts = shared + (parts_at - at);
    full = ring + STAGES * STAGE_BYTES + APART_BYTES, empty = full + STAGES * 8;
    rank = S > 1 ? cluster_rank() : 0;
    const int cluster = blockIdx.y / S, row_tiles = ceil_div(p.rows, ROWS);
    row = cluster % row_tiles * ROWS, column = cluster / row_tiles * WIDTH;
    const int all = ceil_div(p.k, DEPTH), each = ceil_div(all, S);
    begin = rank * each, steps = max(0, min(all - begin, each));
  }

  DEVICE void copy_weights(int stage, int step, const TensorMap* map, const Product& p) const {
    const smem_t to = ring + stage * STAGE_BYTES + X_BYTES;
    const int k = (begin + step) * DEPTH;
    copy_box(to, map, k, column, full + stage * 8);
    copy_box(to + W_BYTES / 2, map, k, IS_GATED ? p.n + column : column + COLUMNS / 2, full + stage * 8);
  }
  DEVICE void copy_rows(int stage, int step, const TensorMap* map) const {
    copy_box(ring + stage * STAGE_BYTES, map, (begin + step) * DEPTH, row, full + stage * 8);
  }

  DEVICE void prefetch_weights(const TensorMap* w_map, const Product& p) const {
    for (int s = 0; s < min(STAGES, steps); s++) barrier_arrive_expect(full + s * 8, STAGE_BYTES), copy_weights(s, s, w_map, p);
  }

  DEVICE void produce(const TensorMap* x_map, const TensorMap* w_map, const Product& p) const {
    const int first = min(STAGES, steps);
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

  // Where a row's sums of one part lie. Rows eight apart would meet in a bank.
  DEVICE u32 place(int which, int r, int c) const {
    return ((which * OWN_ROWS + r % OWN_ROWS) * STRIDE + (c ^ (r & 8))) * 4;
  }

  // This thread's pieces: row of the tile and column of y.
  DEVICE bool piece(int i, const Product& p, int& r, int& c) const {
    const int at = i * COMPUTING + threadIdx.x;
    r = rank * OWN_ROWS + at / (WIDTH / 4), c = column + at % (WIDTH / 4) * 4;
    return at < OWN_ROWS * (WIDTH / 4) && row + r < p.rows && c < p.n;
  }

  DEVICE void consume(const Product& p) const {
    // From the first lane: the same in all, so that descriptors need no registers of each.
    const int warp = __shfl_sync(FULL_WARP, threadIdx.x >> 5, 0), lane = threadIdx.x & 31, wgroup = warp >> 2;
    wait_for_previous_kernels();
    u32x2 bias[EACH], more[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      int r, c;
      const bool there = !IS_GATED && piece(i, p, r, c);
      bias[i] = more[i] = u32x2{{0, 0}};
      if (there && p.bias) bias[i] = *(const u32x2*)(p.bias + c);
      if (there && p.residual) more[i] = load_stream8(p.residual + (u64)(row + r) * p.n + c);
    }
    float d[COLUMNS / 8][4];
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j++) d[j][0] = d[j][1] = d[j][2] = d[j][3] = 0.f;
    const tile_t x_tile = base_tile(ring, 1024, 16), w_tile = base_tile(ring + X_BYTES, 1024, 16);
    int stage = wgroup, before = -1;
    u32 parity = 0;
    for (int step = wgroup; step < steps; step += 2) {
      const u32 moved = __shfl_sync(FULL_WARP, stage * STAGE_BYTES, 0);  // the same in all, as above
      const tile_t x = moved_tile(x_tile, moved), w = moved_tile(w_tile, moved);
      barrier_wait(full + stage * 8, parity);
      wgmma_settle(d);
      wgmma_fence();
#pragma unroll
      for (int s = 0; s < DEPTH / 16; s++) wgmma_shared(d, moved_tile(x, s * 32), moved_tile(w, s * 32), 1);
      wgmma_commit();
      // A stage may be filled again when its products are done: those of the step before, or where the ring is short and
      // no time may be lost, these.
      wgmma_wait<STAGES >= 6 ? 1 : 0>();
      const int done = STAGES >= 6 ? before : stage;
      if (done >= 0 && lane == 0) barrier_arrive(empty + done * 8);
      before = stage;
      stage += 2;
      if (stage >= STAGES) stage -= STAGES, parity ^= 1;
    }
    wgmma_wait<0>();
    wgmma_settle(d);
    if (S == 1) named_wait(1, COMPUTING);  // now the ring is free
    share(d, wgroup, warp & 3, lane, p);
    if (S == 1) named_wait(1, COMPUTING);
    else cluster_arrive(), cluster_wait();
    finish(p, bias, more);
  }

  // Sums to the block that finishes their row.
  DEVICE void share(const float (&d)[COLUMNS / 8][4], int wgroup, int warp, int lane, const Product& p) const {
    const bool odd = lane & 1;
    const int r = warp * 16 + (lane >> 2) + odd * 8, which = rank * 2 + wgroup, owner = r / OWN_ROWS;
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j++) {
      // A lane gets four columns of one row: it gives its neighbour what it has of the other.
      const float a = __shfl_xor_sync(FULL_WARP, odd ? d[j][0] : d[j][2], 1);
      const float b = __shfl_xor_sync(FULL_WARP, odd ? d[j][1] : d[j][3], 1);
      const smem_t to = parts_at + place(which, r, j * 8 + (lane & 2) * 2);
      if (row + r >= p.rows) continue;
      if (odd) store_in_cluster4(to, owner, a, b, d[j][2], d[j][3]);
      else store_in_cluster4(to, owner, d[j][0], d[j][1], a, b);
    }
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

  DEVICE void finish(const Product& p, const u32x2 (&bias)[EACH], const u32x2 (&more)[EACH]) const {
#pragma unroll(IS_GATED ? 1 : EACH)
    for (int i = 0; i < EACH; i++) {
      int r, c;
      if (!piece(i, p, r, c)) continue;
      const float4 sum = total(r, c - column);
      u32x2 y;
      if constexpr (IS_GATED) {
        const float4 up = total(r, c - column + WIDTH);
        const float gates[4] = {sum.x, sum.y, sum.z, sum.w}, ups[4] = {up.x, up.y, up.z, up.w};
        y = {{gate_pair(gates, ups), gate_pair(gates + 2, ups + 2)}};
      } else {
        y.r[0] = pack_bf16(sum.x + low_bf16(bias[i].r[0]) + low_bf16(more[i].r[0]), sum.y + high_bf16(bias[i].r[0]) + high_bf16(more[i].r[0]));
        y.r[1] = pack_bf16(sum.z + low_bf16(bias[i].r[1]) + low_bf16(more[i].r[1]), sum.w + high_bf16(bias[i].r[1]) + high_bf16(more[i].r[1]));
      }
      *(u32x2*)(p.out + (u64)(row + r) * p.n + c) = y;
    }
  }

  DEVICE void run(const TensorMap* x_map, const TensorMap* w_map, const Product& p) const {
    if (threadIdx.x == COMPUTING) {
      for (int s = 0; s < STAGES; s++) {
        barrier_init(full + s * 8, 1);
        barrier_init(empty + s * 8, 4);  // every warp that reads it
      }
      publish_barriers();
    }
    __syncthreads();
    if (S > 1) cluster_arrive();
    if (threadIdx.x == COMPUTING) prefetch_weights(w_map, p);
    __syncwarp();
    if (S > 1) cluster_wait();  // all have begun: their memory may be written
    if (threadIdx.x < COMPUTING) {
      consume(p);
    } else {
      if (threadIdx.x == COMPUTING) produce(x_map, w_map, p);
      __syncwarp();
      if (S > 1) cluster_arrive(), cluster_wait();
    }
  }
};

#define SPLIT(NAME, AFTER, S)                                                                                               \
  KERNEL void __launch_bounds__(THREADS, 2)                                                                                  \
  NAME(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, const bf16* __restrict__ bias,      \
       const bf16* residual, bf16* out, int rows, int n, int k) {                                                            \
    DYNAMIC_SHARED(shared);                                                                                                  \
    let_next_kernel_start();                                                                                                 \
    const Product p = {bias, residual, out, rows, n, k};                                                       \
    Split<AFTER, S>(shared, p).run(&x_map, &w_map, p);                                                                       \
  }
SPLIT(split_gated, GATED, 1)
SPLIT(split_plain_s4, PLAIN, 4)
SPLIT(split_plain_s8, PLAIN, 8)

#undef COLUMNS
#undef COMPUTING
#undef DEPTH
#undef ROOM
#undef ROWS
#undef SPLIT
#undef THREADS
