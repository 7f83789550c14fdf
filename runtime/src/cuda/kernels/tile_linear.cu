// Products of 17 to some hundred rows with what surrounds them, for decode: y = after(norm(x) W^T), in one launch.
//
//   tile_m{M}_{after}_c{C}: M rows of x against 64 rows of weights a block, on the tensor cores (mma.m16n8k16).
//
// norm, after, operands and layouts as in fused_linear.cu. k a multiple of 64; n of 64 (gated: 32; rotated: 32 pairs, which
// divide head_dim / 2). Clusters of C blocks along y divide k and add up through distributed shared memory; each then
// finishes M / C rows.
// Grid: (n / 64, C, ceil(rows / M)), for pairs (pairs / 32, C, ...); 256 threads. Dynamic shared memory: STAGES * (64 + M
// + 1) * 128 + M * 69 * 4 bytes.
//
// Tiles of 64 elements of k come through a ring of asynchronous copies, rows of 128 bytes with their 16-byte pieces
// exchanged by row, so that ldmatrix meets no bank twice. Half of the warps take one half of each tile's k. Weights of the
// first stages are fetched before the wait for the kernel before.
// Expected: weights at about 3 TB/s while x (n / 64 times rows * k * 2 bytes out of L2) is no larger than they are.

#define TILE_N 64
#define TILE_K 64
#define TILE_THREADS 256
#define STAGES 5
#define STRIDE (TILE_N + 4)

DEVICE u32 place(int row, int piece) { return row * 128 + ((piece ^ (row & 7)) << 4); }

template <int M, int C, After AFTER> DEVICE void tile(const Operands& o, const Places& p) {
  constexpr int MINE = M / 2, TILES = MINE / 8;  // a warp has 32 columns, MINE rows, half of k
  constexpr int W_BYTES = TILE_N * 128, NORM_AT = W_BYTES + M * 128, STAGE = NORM_AT + 128;
  constexpr int W_EACH = TILE_N * 8 / TILE_THREADS, X_EACH = M * 8 / TILE_THREADS;
  constexpr int ROWS = M / C, OUTS = AFTER == PLAIN ? TILE_N : TILE_N / 2;  // rows and columns that this block finishes
  constexpr int EACH = (ROWS * OUTS + TILE_THREADS - 1) / TILE_THREADS;
  static_assert(2 * M * STRIDE * 4 + 2 * M * 4 <= STAGES * STAGE);
  DYNAMIC_SHARED(base);
  float* parts = (float*)(base + STAGES * STAGE);  // [C][ROWS][STRIDE], from all blocks of the cluster
  float* square_parts = parts + M * STRIDE;        // [C][ROWS]
  float* mine = (float*)base;                      // [2][M][STRIDE], after the last tile
  float* my_squares = mine + 2 * M * STRIDE;       // [2][M]
  const smem_t shared = smem_address(base);
  const int rank = C > 1 ? cluster_rank() : 0, k = o.k, row0 = blockIdx.z * M, rows = min(M, o.rows - row0);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int half_k = warp >> 2, warp_n = warp >> 1 & 1, warp_m = warp & 1;
  const int all = k / TILE_K, each = ceil_div(all, C), begin = rank * each, end = min(all, begin + each);
  const int column0 = blockIdx.x * OUTS;
  const int row_of_thread = threadIdx.x >> 3, piece = threadIdx.x & 7;
  const bf16 *w_from[W_EACH], *x_from = o.x + (u64)(row0 + row_of_thread) * k + piece * 8;
#pragma unroll
  for (int i = 0; i < W_EACH; i++) {
    const int r = row_of_thread + i * (TILE_THREADS / 8);
    const int row = AFTER == PLAIN ? column0 + r : pair_row<AFTER>(p, column0 + r % OUTS) + (r < OUTS ? 0 : pair_apart<AFTER>(o, p));
    w_from[i] = o.weights + (u64)row * k + piece * 8;
  }
  const auto copy_weights = [&](int step, int slot) {
    const smem_t to = shared + slot * STAGE;
#pragma unroll
    for (int i = 0; i < W_EACH; i++)
      copy_async_16(to + place(row_of_thread + i * (TILE_THREADS / 8), piece), w_from[i] + step * TILE_K, true);
    if (o.norm != nullptr && threadIdx.x < 8) copy_async_16(to + NORM_AT + threadIdx.x * 16, o.norm + step * TILE_K + threadIdx.x * 8, true);
  };
  const auto copy_x = [&](int step, int slot) {
    const smem_t to = shared + slot * STAGE + W_BYTES;
#pragma unroll
    for (int i = 0; i < X_EACH; i++) {
      const int m = row_of_thread + i * (TILE_THREADS / 8);
      copy_async_16(to + place(m, piece), x_from + (u64)i * (TILE_THREADS / 8) * k + step * TILE_K, m < rows);
    }
  };
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++)
    if (begin + s < end) copy_weights(begin + s, s);
  if (C > 1) cluster_arrive();
  let_next_kernel_start();
  wait_for_previous_kernels();
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) {
    if (begin + s < end) copy_x(begin + s, s);
    copy_async_commit();
  }
  // What is added to the outputs of this thread comes meanwhile.
  float extra[EACH];
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    const int i = e * TILE_THREADS + threadIdx.x, local = rank * ROWS + i / OUTS;
    extra[e] = AFTER == PLAIN && i < ROWS * OUTS && local < rows ? o.extra(row0 + local, column0 + i % OUTS) : 0.f;
  }
  float sum[2][TILES][4], squares[TILES][2];
#pragma unroll
  for (int a = 0; a < 2; a++)
#pragma unroll
    for (int b = 0; b < TILES; b++) sum[a][b][0] = sum[a][b][1] = sum[a][b][2] = sum[a][b][3] = 0.f;
#pragma unroll
  for (int b = 0; b < TILES; b++) squares[b][0] = squares[b][1] = 0.f;
  const int a_row = warp_n * 32 + (lane & 15), a_piece = half_k * 4 + (lane >> 4);
  const int b_row = warp_m * MINE + (lane & 7) + (lane >> 4) * 8, b_piece = half_k * 4 + (lane >> 3 & 1);
  int slot = 0, next = STAGES - 1;
  for (int step = begin; step < end; step++) {
    copy_async_wait<STAGES - 2>();
    __syncthreads();
    if (step + STAGES - 1 < end) copy_weights(step + STAGES - 1, next), copy_x(step + STAGES - 1, next);
    copy_async_commit();
    const smem_t w_at = shared + slot * STAGE, x_at = w_at + W_BYTES;
#pragma unroll
    for (int kk = 0; kk < 2; kk++) {
      u32 a[2][4], norm[2] = {0, 0};
      if (o.norm != nullptr) {
        const u32* from = (const u32*)(base + slot * STAGE + NORM_AT) + (half_k * 2 + kk) * 8 + (lane & 3);
        norm[0] = from[0], norm[1] = from[4];
      }
      ldmatrix_x4(a[0], w_at + place(a_row, kk * 2 + a_piece));
      ldmatrix_x4(a[1], w_at + place(a_row + 16, kk * 2 + a_piece));
#pragma unroll
      for (int b = 0; b < TILES; b += 2) {
        u32 x[4];
        ldmatrix_x4(x, x_at + place(b_row + b * 8, kk * 2 + b_piece));
        if (o.norm != nullptr) {
          if (warp_n == 0) add_squares(squares[b], x[0], x[1]), add_squares(squares[b + 1], x[2], x[3]);
#pragma unroll
          for (int i = 0; i < 4; i++) x[i] = mul_bf16x2(x[i], norm[i & 1]);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
          mma_bf16(sum[i][b], a[i], x[0], x[1]);
          mma_bf16(sum[i][b + 1], a[i], x[2], x[3]);
        }
      }
    }
    slot = slot + 1 == STAGES ? 0 : slot + 1, next = next + 1 == STAGES ? 0 : next + 1;
  }
  // Where the pairs of this thread go: its loads pass while the blocks exchange their sums.
  constexpr int TURNS = AFTER == ROTATED ? EACH : 1;
  Turn turns[TURNS];
  float bias[TURNS][2];
#pragma unroll
  for (int e = 0; e < TURNS; e++) {
    const int i = e * TILE_THREADS + threadIdx.x, local = rank * ROWS + i / OUTS, r = column0 + i % OUTS;
    const bool there = AFTER == ROTATED && i < ROWS * OUTS && local < rows;
    turns[e] = Turn(o, p, there ? row0 + local : o.rows, r);
    const bool biased = there && o.bias != nullptr;
    bias[e][0] = biased ? to_float(o.bias[pair_row<AFTER>(p, r)]) : 0.f;
    bias[e][1] = biased ? to_float(o.bias[pair_row<AFTER>(p, r) + pair_apart<AFTER>(o, p)]) : 0.f;
  }
  __syncthreads();
#pragma unroll
  for (int b = 0; b < TILES; b++) {
    float square;
    if (o.norm != nullptr && warp_n == 0 && diagonal(squares[b], lane, square))
      my_squares[half_k * M + warp_m * MINE + b * 8 + (lane >> 2)] = square;
#pragma unroll
    for (int e = 0; e < 2; e++) {
      float* to = mine + (half_k * M + warp_m * MINE + b * 8 + (lane & 3) * 2 + e) * STRIDE + warp_n * 32 + (lane >> 2);
#pragma unroll
      for (int i = 0; i < 4; i++) to[i * 8] = sum[i >> 1][b][(i & 1) * 2 + e];
    }
  }
  __syncthreads();
  if (C > 1) {  // every block gets its rows from all
    cluster_wait();  // all have begun: their memory may be written
    for (int i = threadIdx.x; i < M * TILE_N / 4; i += TILE_THREADS) {
      const int m = i / (TILE_N / 4), at = i % (TILE_N / 4) * 4, owner = m / ROWS;
      const float4 a = *(const float4*)(mine + m * STRIDE + at), b = *(const float4*)(mine + (M + m) * STRIDE + at);
      if (m < rows)
        store_in_cluster4(smem_address(parts + (rank * ROWS + m % ROWS) * STRIDE + at), owner, a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
    }
    if (o.norm != nullptr && threadIdx.x < M)
      store_in_cluster(smem_address(square_parts + rank * ROWS + threadIdx.x % ROWS), threadIdx.x / ROWS,
                       my_squares[threadIdx.x] + my_squares[M + threadIdx.x]);
    cluster_arrive();
    cluster_wait();
  }
  const float* from = C > 1 ? parts : mine;
  const float* squares_from = C > 1 ? square_parts : my_squares;
  constexpr int PARTS = C > 1 ? C : 2;
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    const int i = e * TILE_THREADS + threadIdx.x, local = i / OUTS, r = i % OUTS, m = row0 + rank * ROWS + local;
    if (i >= ROWS * OUTS || rank * ROWS + local >= rows) continue;
    float a = 0.f, b = 0.f, square = 0.f;
#pragma unroll
    for (int s = 0; s < PARTS; s++) {
      a += from[(s * ROWS + local) * STRIDE + r];
      if (AFTER != PLAIN) b += from[(s * ROWS + local) * STRIDE + r + OUTS];
      if (o.norm != nullptr) square += squares_from[s * ROWS + local];
    }
    const float factor = o.norm != nullptr ? rsqrtf(square / (float)k + o.eps) : 1.f;
    if (AFTER == PLAIN) o.store(m, column0 + r, a * factor + extra[e]);
    else if (AFTER == GATED) o.store(m, column0 + r, gate(a * factor, b * factor));
    else turns[e < TURNS ? e : 0].store(a * factor + bias[e < TURNS ? e : 0][0], b * factor + bias[e < TURNS ? e : 0][1]);
  }
}

FUSED(tile_m32_plain_c8, 256 COMMA 2, tile<32 COMMA 8 COMMA PLAIN>)
FUSED(tile_m32_gated_c2, 256 COMMA 2, tile<32 COMMA 2 COMMA GATED>)
FUSED(tile_m32_rotated_c8, 256 COMMA 2, tile<32 COMMA 8 COMMA ROTATED>)
FUSED(tile_m64_plain_c8, 256 COMMA 2, tile<64 COMMA 8 COMMA PLAIN>)
FUSED(tile_m64_rotated_c8, 256 COMMA 2, tile<64 COMMA 8 COMMA ROTATED>)

#undef STAGES
#undef STRIDE
#undef TILE_K
#undef TILE_N
#undef TILE_THREADS
