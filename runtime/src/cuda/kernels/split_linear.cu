// y = x W^T for some dozens of rows, on Hopper: tiles by the copy engine, warpgroup products, and what surrounds them.
//
//   split_plain_s{S}   y = x W^T (+ bias) (+ residual); clusters of S blocks divide k
//   split_gated        y = silu(x G^T) * (x U^T); w rows: n of G, then n of U
//   split_gated_norm   the same of RMS norm(x) with the weight `norm`
//
// x [rows, k], w [n or 2 n, k], bias [n], residual and y [rows, n], norm [k], all bf16; sums in f32. n a multiple of 8, k
// too; any number of rows, by tiles of 64. bias and residual may be null; residual may be y. x times the norm's weight is
// rounded to bf16, the result is divided by the root mean square of x.
// x_map: boxes of 64 rows of 64 columns (gated: 32 rows), w_map: 32 rows; zeros beyond the edges.
//
// A block computes 64 rows by 64 rows of w (gated: half of them of G, half of U) over its part of k. Its last warp
// brings 64 of k at a time into a ring, weights before the wait for the kernel before; two warpgroups take turns at them.
// gated: pairs of column tiles share x, each block brings half of it to both.
// plain: each block of a cluster gets its share of the rows' sums from all, through distributed shared memory.
// Grid: y = clusters, row tiles innermost; 288 threads; dynamic shared memory: as Split::wide.rs says.
// Expected: bytes of weights at 4 TB/s, and 4 us for what cannot overlap (a cluster's exchange, the first tile of x).

#define DEPTH 64  // of k at a time: a row of 128 bytes
#define THREADS 288
#define COMPUTING 256
#define ROWS 64     // of x
#define COLUMNS 64  // rows of w
#define ROOM 114688  // shared memory that leaves room for the next kernel's block

enum After { PLAIN, GATED, NORM_GATED };

struct Product {
  const bf16 *norm, *bias, *residual;
  bf16* out;
  int rows, n, k;
  float eps;
};

// S: blocks that divide k, of a cluster; gated: none, its clusters are pairs.
template <After AFTER, int S> struct Split {
  static constexpr bool IS_GATED = AFTER != PLAIN, HAS_NORM = AFTER == NORM_GATED;
  static constexpr int WIDTH = IS_GATED ? COLUMNS / 2 : COLUMNS;  // of y
  static constexpr int BLOCKS = IS_GATED ? 2 : S;
  static constexpr u32 X_BYTES = ROWS * DEPTH * 2, W_BYTES = COLUMNS * DEPTH * 2, STAGE_BYTES = X_BYTES + W_BYTES;
  static constexpr int PARTS = 2 * S, OWN_ROWS = ROWS / S, STRIDE = COLUMNS + 16;
  static constexpr u32 PARTS_BYTES = PARTS * OWN_ROWS * STRIDE * 4, SQUARES_BYTES = 2 * ROWS * 4;
  // Between blocks the sums have a place of their own, so that nobody need wait for another's last step.
  static constexpr u32 APART_BYTES = S > 1 ? PARTS_BYTES : 0;
  static constexpr int STAGES = (ROOM - 2048 - APART_BYTES - SQUARES_BYTES) / STAGE_BYTES;
  static constexpr int EACH = (OWN_ROWS * WIDTH / 4 + COMPUTING - 1) / COMPUTING;  // pieces of four columns a thread finishes
  static_assert(S > 1 || PARTS_BYTES <= STAGES * STAGE_BYTES);

  u8* parts;      // sums of this block's rows [PARTS][OWN_ROWS][STRIDE] f32
  float* squares;  // sums of x^2 [2][ROWS]
  smem_t ring, parts_at, full, empty;
  int rank, row, column, begin, steps;

  DEVICE Split(u8* shared, const Product& p) {
    const smem_t at = smem_address(shared), aligned = (at + 1023) / 1024 * 1024;
    ring = aligned, parts_at = S > 1 ? ring + STAGES * STAGE_BYTES : ring;
    parts = shared + (parts_at - at);
    squares = (float*)(shared + (ring - at) + STAGES * STAGE_BYTES + APART_BYTES);
    full = ring + STAGES * STAGE_BYTES + APART_BYTES + SQUARES_BYTES, empty = full + STAGES * 8;
    rank = cluster_rank();
    const int cluster = blockIdx.y / BLOCKS, row_tiles = ceil_div(p.rows, ROWS);
    row = cluster % row_tiles * ROWS;
    column = (IS_GATED ? cluster / row_tiles * 2 + rank : cluster / row_tiles) * WIDTH;
    const int all = ceil_div(p.k, DEPTH), each = ceil_div(all, S);
    begin = IS_GATED ? 0 : rank * each, steps = max(0, min(all - begin, each));
  }

  DEVICE void copy_weights(int stage, int step, const TensorMap* map, const Product& p) const {
    const smem_t to = ring + stage * STAGE_BYTES + X_BYTES;
    const int k = (begin + step) * DEPTH;
    copy_box(to, map, k, column, full + stage * 8);
    copy_box(to + W_BYTES / 2, map, k, IS_GATED ? p.n + column : column + COLUMNS / 2, full + stage * 8);
  }
  // gated: this block's half, to both of the pair.
  DEVICE void copy_rows(int stage, int step, const TensorMap* map) const {
    const smem_t to = ring + stage * STAGE_BYTES;
    const int k = (begin + step) * DEPTH, half = rank * (ROWS / 2);
    if (IS_GATED) copy_box_to_all(to + half * 128, map, k, row + half, full + stage * 8, 3);
    else copy_box(to, map, k, row, full + stage * 8);
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

  DEVICE void release(int stage) const {
    const int lane = threadIdx.x & 31;
    if (!IS_GATED && lane == 0) barrier_arrive(empty + stage * 8);
    if (IS_GATED && lane < 2) barrier_arrive_in(empty + stage * 8, lane);
  }

  // Where a row's sums of one part lie. Rows eight apart would meet in a bank.
  DEVICE u32 place(int which, int r, int c) const {
    return ((which * OWN_ROWS + r % OWN_ROWS) * STRIDE + (c ^ (r & 8))) * 4;
  }

  // This thread's pieces: row of the tile and column of y.
  DEVICE bool piece(int i, const Product& p, int& r, int& c) const {
    const int at = i * COMPUTING + threadIdx.x;
    r = (IS_GATED ? 0 : rank * OWN_ROWS) + at / (WIDTH / 4), c = column + at % (WIDTH / 4) * 4;
    return at < OWN_ROWS * (WIDTH / 4) && row + r < p.rows && c < p.n;
  }

  // The products of one stage, with x from shared memory.
  DEVICE void multiply(float (&d)[COLUMNS / 8][4], int stage) const {
    const tile_t x = swizzled_tile(ring + stage * STAGE_BYTES, 1024, 16);
    const tile_t w = swizzled_tile(ring + stage * STAGE_BYTES + X_BYTES, 1024, 16);
    wgmma_settle(d);
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < DEPTH / 16; s++) wgmma_shared(d, moved_tile(x, s * 32), moved_tile(w, s * 32), 1);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_settle(d);
  }

  // The same with x through registers, times the norm's weight; adds up the squares of x.
  DEVICE void multiply_normed(float (&d)[COLUMNS / 8][4], int stage, int step, const bf16* norm, int k, float (&sums)[2]) const {
    const int lane = threadIdx.x & 31, r = (threadIdx.x >> 5 & 3) * 16 + (lane & 15);
    const smem_t x = ring + stage * STAGE_BYTES + r * 128;
    const tile_t w = swizzled_tile(ring + stage * STAGE_BYTES + X_BYTES, 1024, 16);
    u32 a[DEPTH / 16][4];
#pragma unroll
    for (int s = 0; s < DEPTH / 16; s++) {
      ldmatrix_x4(a[s], x + (((s * 2 + (lane >> 4)) ^ (r & 7)) << 4));
      const int at = step * DEPTH + s * 16 + (lane & 3) * 2;
      const u32 low = at < k ? *(const u32*)(norm + at) : 0, high = at + 8 < k ? *(const u32*)(norm + at + 8) : 0;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float first = low_bf16(a[s][i]), second = high_bf16(a[s][i]);
        sums[i & 1] += first * first + second * second;
        a[s][i] = mul_bf16x2(a[s][i], i < 2 ? low : high);
      }
    }
    wgmma_settle(d);
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < DEPTH / 16; s++) wgmma_rows(d, a[s], moved_tile(w, s * 32));
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_settle(d);
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
    float d[COLUMNS / 8][4], sums[2] = {0.f, 0.f};
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j++) d[j][0] = d[j][1] = d[j][2] = d[j][3] = 0.f;
    int stage = wgroup;
    u32 parity = 0;
    for (int step = wgroup; step < steps; step += 2) {
      barrier_wait(full + stage * 8, parity);
      if constexpr (HAS_NORM) multiply_normed(d, stage, step, p.norm, p.k, sums);
      else multiply(d, stage);
      release(stage);
      stage += 2;
      if (stage >= STAGES) stage -= STAGES, parity ^= 1;
    }
    if (IS_GATED) cluster_arrive(), named_wait(1, COMPUTING);  // now the ring is free
    share(d, sums, wgroup, warp & 3, lane, p);
    if (IS_GATED) named_wait(1, COMPUTING);
    else cluster_arrive(), cluster_wait();
    finish(p, bias, more);
    if (IS_GATED) cluster_wait();  // the other may still arrive at the barriers here
  }

  // Sums to the block that finishes their row.
  DEVICE void share(const float (&d)[COLUMNS / 8][4], const float (&sums)[2], int wgroup, int warp, int lane, const Product& p) const {
    const bool odd = lane & 1;
    const int r = warp * 16 + (lane >> 2) + odd * 8, which = (IS_GATED ? 0 : rank * 2) + wgroup, owner = r / OWN_ROWS;
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j++) {
      // A lane gets four columns of one row: it gives its neighbour what it has of the other.
      const float a = __shfl_xor_sync(FULL_WARP, odd ? d[j][0] : d[j][2], 1);
      const float b = __shfl_xor_sync(FULL_WARP, odd ? d[j][1] : d[j][3], 1);
      const smem_t to = parts_at + place(which, r, j * 8 + (lane & 2) * 2);
      if (row + r >= p.rows) continue;
      if (odd) store_in_cluster4(to, IS_GATED ? rank : owner, a, b, d[j][2], d[j][3]);
      else store_in_cluster4(to, IS_GATED ? rank : owner, d[j][0], d[j][1], a, b);
    }
#pragma unroll
    for (int half = 0; half < (HAS_NORM ? 2 : 0); half++) {
      float sum = sums[half];
      sum += __shfl_xor_sync(FULL_WARP, sum, 1);
      sum += __shfl_xor_sync(FULL_WARP, sum, 2);
      if ((lane & 3) == 0) squares[wgroup * ROWS + warp * 16 + half * 8 + (lane >> 2)] = sum;
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
        const float factor = HAS_NORM ? rsqrtf((squares[r] + squares[ROWS + r]) / (float)p.k + p.eps) : 1.f;
        const float gates[4] = {sum.x * factor, sum.y * factor, sum.z * factor, sum.w * factor};
        const float ups[4] = {up.x * factor, up.y * factor, up.z * factor, up.w * factor};
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
        barrier_init(empty + s * 8, IS_GATED ? 8 : 4);  // every warp that reads it, in both of a pair
      }
      publish_barriers();
    }
    __syncthreads();
    cluster_arrive();
    if (threadIdx.x >= COMPUTING) {
      if (threadIdx.x == COMPUTING) prefetch_weights(w_map, p);
      __syncwarp();
      cluster_wait();  // all have begun: their memory may be written
      if (threadIdx.x == COMPUTING) produce(x_map, w_map, p);
      __syncwarp();
      cluster_arrive(), cluster_wait();
    } else {
      cluster_wait();
      consume(p);
    }
  }
};

#define SPLIT(NAME, AFTER, S)                                                                                               \
  KERNEL void __launch_bounds__(THREADS, 2)                                                                                  \
  NAME(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, const bf16* __restrict__ bias,      \
       const bf16* residual, bf16* out, int rows, int n, int k) {                                                            \
    DYNAMIC_SHARED(shared);                                                                                                  \
    let_next_kernel_start();                                                                                                 \
    const Product p = {nullptr, bias, residual, out, rows, n, k, 0.f};                                                       \
    Split<AFTER, S>(shared, p).run(&x_map, &w_map, p);                                                                       \
  }
SPLIT(split_gated, GATED, 1)
SPLIT(split_plain_s4, PLAIN, 4)
SPLIT(split_plain_s8, PLAIN, 8)

KERNEL void __launch_bounds__(THREADS, 2)
split_gated_norm(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map,
                     const bf16* __restrict__ norm, bf16* out, int rows, int n, int k, float eps) {
  DYNAMIC_SHARED(shared);
  let_next_kernel_start();
  const Product p = {norm, nullptr, nullptr, out, rows, n, k, eps};
  Split<NORM_GATED, 1>(shared, p).run(&x_map, &w_map, p);
}

#undef COLUMNS
#undef COMPUTING
#undef DEPTH
#undef ROOM
#undef ROWS
#undef SPLIT
#undef THREADS
