// Products of 9 to 64 rows with what surrounds them, for decode: y = after(norm(x) W^T), in one launch.
//
//   tile_m{M}_{after}_n{N}: 1..M rows of x against N rows of weights a block, on the tensor cores (mma.m16n8k16).
//
// norm, after, operands and layouts as in fused_linear.cu. k a multiple of 64; n of N (gated, rotated: of
// N / 2, which for rotated divides head_dim / 2). Clusters of C = 1, 2, 4 or 8 blocks along y divide k and add up through
// distributed shared memory; each then finishes M / C rows.
// Grid: (n / N, C), for pairs (pairs / (N / 2), C); 2 N threads (M = 16: N). Dynamic shared memory: STAGES * (N + M +
// 1) * 128 + M * (N + 5) * 4 bytes.
//
// Tiles of 64 elements of k come through a ring of asynchronous copies, rows of 128 bytes with their 16-byte pieces
// exchanged by row, so that ldmatrix meets no bank twice. Weights of the first stages are fetched before the wait for the
// kernel before.
// Expected: weights at about 4 TB/s when x (n / N times rows * k * 2 bytes out of L2) is no larger than they are.

#define TILE_K 64
#define STAGES 4

DEVICE u32 place(int row, int piece) { return row * 128 + ((piece ^ (row & 7)) << 4); }

template <int M, int N, After AFTER> DEVICE void tile(const Operands& o, const Places& p) {
  constexpr int WARPS_M = M >= 32 ? 2 : 1, THREADS = N * WARPS_M, MINE = M / WARPS_M;  // a warp has 32 columns, MINE rows
  constexpr int TILES = MINE / 8, W_BYTES = N * 128, NORM_AT = W_BYTES + M * 128, STAGE = NORM_AT + 128, STRIDE = N + 4;
  constexpr int W_EACH = N * 8 / THREADS, X_EACH = M * 8 / THREADS;
  static_assert(M * 8 % THREADS == 0);
  DYNAMIC_SHARED(base);
  float* parts = (float*)(base + STAGES * STAGE);  // [clusters][M / clusters][STRIDE]
  float* square_parts = parts + M * STRIDE;          // [clusters][M / clusters]
  const smem_t shared = smem_address(base);
  const int clusters = cluster_size(), rank = cluster_rank(), k = o.k;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warp_n = warp / WARPS_M, warp_m = warp % WARPS_M;
  const int all = k / TILE_K, each = ceil_div(all, clusters), begin = rank * each, end = min(all, begin + each);
  const int column0 = blockIdx.x * (AFTER == PLAIN ? N : N / 2);
  const int row_of_thread = threadIdx.x >> 3, piece = threadIdx.x & 7;
  const bf16* w_from[W_EACH];
#pragma unroll
  for (int i = 0; i < W_EACH; i++) {
    const int r = row_of_thread + i * (THREADS / 8);
    const int row = AFTER == PLAIN ? column0 + r : pair_row<AFTER>(p, column0 + r % (N / 2)) + (r < N / 2 ? 0 : pair_apart<AFTER>(o, p));
    w_from[i] = o.weights + (u64)row * k + piece * 8;
  }
  const auto copy_weights = [&](int step) {
    const smem_t to = shared + (step - begin) % STAGES * STAGE;
#pragma unroll
    for (int i = 0; i < W_EACH; i++)
      copy_async_16(to + place(row_of_thread + i * (THREADS / 8), piece), w_from[i] + step * TILE_K, true);
    if (o.norm != nullptr && threadIdx.x < 8) copy_async_16(to + NORM_AT + threadIdx.x * 16, o.norm + step * TILE_K + threadIdx.x * 8, true);
  };
  const auto copy_x = [&](int step) {
    const smem_t to = shared + (step - begin) % STAGES * STAGE + W_BYTES;
#pragma unroll
    for (int i = 0; i < X_EACH; i++) {
      const int m = row_of_thread + i * (THREADS / 8);
      copy_async_16(to + place(m, piece), o.x + (u64)m * k + step * TILE_K + piece * 8, m < o.rows);
    }
  };
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++)
    if (begin + s < end) copy_weights(begin + s);
  if (clusters > 1) cluster_arrive();
  let_next_kernel_start();
  wait_for_previous_kernels();
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) {
    if (begin + s < end) copy_x(begin + s);
    copy_async_commit();
  }
  float sum[2][TILES][4], squares[TILES][2];
#pragma unroll
  for (int a = 0; a < 2; a++)
#pragma unroll
    for (int b = 0; b < TILES; b++) sum[a][b][0] = sum[a][b][1] = sum[a][b][2] = sum[a][b][3] = 0.f;
#pragma unroll
  for (int b = 0; b < TILES; b++) squares[b][0] = squares[b][1] = 0.f;
  const int a_row = warp_n * 32 + (lane & 15), a_piece = lane >> 4;
  const int b_row = warp_m * MINE + (lane & 7) + (lane >> 4) * 8, b_piece = lane >> 3 & 1;
  for (int step = begin; step < end; step++) {
    copy_async_wait<STAGES - 2>();
    __syncthreads();
    if (step + STAGES - 1 < end) copy_weights(step + STAGES - 1), copy_x(step + STAGES - 1);
    copy_async_commit();
    const smem_t w_at = shared + (step - begin) % STAGES * STAGE, x_at = w_at + W_BYTES;
#pragma unroll
    for (int kk = 0; kk < TILE_K / 16; kk++) {
      u32 a[2][4], norm[2] = {0, 0};
      if (o.norm != nullptr) {
        const u32* from = (const u32*)(base + (w_at - shared) + NORM_AT) + kk * 8 + (lane & 3);
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
  }
  // Every block gets its rows from all.
  if (clusters > 1) cluster_wait();  // all have begun: their memory may be written
  const int rows_each = M / clusters;
#pragma unroll
  for (int b = 0; b < TILES; b++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int m = warp_m * MINE + b * 8 + (lane & 3) * 2 + e, owner = m / rows_each;
      float* to = parts + (rank * rows_each + m - owner * rows_each) * STRIDE + warp_n * 32 + (lane >> 2);
      if (m >= o.rows) continue;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float v = sum[i >> 1][b][(i & 1) * 2 + e];
        if (clusters > 1) store_in_cluster(smem_address(to + i * 8), owner, v);
        else to[i * 8] = v;
      }
    }
  if (o.norm != nullptr && warp_n == 0)
#pragma unroll
    for (int b = 0; b < TILES; b++) {
      float mine;
      const int m = warp_m * MINE + b * 8 + (lane >> 2), owner = m / rows_each;
      float* to = square_parts + rank * rows_each + m - owner * rows_each;
      if (!diagonal(squares[b], lane, mine)) continue;
      if (clusters > 1) store_in_cluster(smem_address(to), owner, mine);
      else *to = mine;
    }
  if (clusters > 1) cluster_arrive(), cluster_wait();
  else __syncthreads();
  const auto factor = [&](int m) {
    if (o.norm == nullptr) return 1.f;
    float v = 0.f;
    for (int s = 0; s < clusters; s++) v += square_parts[s * rows_each + m];
    return rsqrtf(v / (float)k + o.eps);
  };
  const auto total = [&](int m, int r) {
    float v = 0.f;
    for (int s = 0; s < clusters; s++) v += parts[(s * rows_each + m) * STRIDE + r];
    return v;
  };
  constexpr int OUTS = AFTER == PLAIN ? N : N / 2;
  for (int i = threadIdx.x; i < rows_each * OUTS; i += THREADS) {
    const int mine = i / OUTS, r = i % OUTS, m = rank * rows_each + mine;
    if (m >= o.rows) return;
    const float f = factor(mine);
    if (AFTER == PLAIN) {
      o.store(m, column0 + r, total(mine, r) * f + o.extra(m, column0 + r));
    } else if (AFTER == GATED) {
      o.store(m, column0 + r, gate(total(mine, r) * f, total(mine, r + N / 2) * f));
    } else {
      const int at = pair_row<AFTER>(p, column0 + r), half = pair_apart<AFTER>(o, p);
      const Turn turn(o, p, m, column0 + r);
      turn.store(total(mine, r) * f + (o.bias != nullptr ? to_float(o.bias[at]) : 0.f),
                 total(mine, r + N / 2) * f + (o.bias != nullptr ? to_float(o.bias[at + half]) : 0.f));
    }
  }
}

FUSED(tile_m16_plain_n64, 64, tile<16 COMMA 64 COMMA PLAIN>)
FUSED(tile_m16_gated_n64, 64, tile<16 COMMA 64 COMMA GATED>)
FUSED(tile_m16_rotated_n64, 64, tile<16 COMMA 64 COMMA ROTATED>)
FUSED(tile_m32_plain_n64, 128, tile<32 COMMA 64 COMMA PLAIN>)
FUSED(tile_m32_gated_n64, 128, tile<32 COMMA 64 COMMA GATED>)
FUSED(tile_m32_gated_n128, 256, tile<32 COMMA 128 COMMA GATED>)
FUSED(tile_m32_rotated_n64, 128, tile<32 COMMA 64 COMMA ROTATED>)
FUSED(tile_m64_plain_n64, 128, tile<64 COMMA 64 COMMA PLAIN>)
FUSED(tile_m64_plain_n128, 256, tile<64 COMMA 128 COMMA PLAIN>)
FUSED(tile_m64_gated_n64, 128, tile<64 COMMA 64 COMMA GATED>)
FUSED(tile_m64_gated_n128, 256, tile<64 COMMA 128 COMMA GATED>)
FUSED(tile_m64_rotated_n64, 128, tile<64 COMMA 64 COMMA ROTATED>)
