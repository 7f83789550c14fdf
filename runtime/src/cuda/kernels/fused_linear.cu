// Products of few rows with what surrounds them, for decode: y = after(norm(x) W^T), in one launch.
//
//   fused_gemv_{after}:                one row of x, arithmetic on the cores; two rows of weights a block of 128 threads.
//   fused_m{M}_{after}_t{T}_w{W}:      1..M rows of x on the tensor cores (mma.m16n8k16), W warps a block, which divide k.
//
// norm: null, or the weight [k] of an RMS norm: x is multiplied by it on its way into the product, whose
// result is divided by the root mean square of x, summed meanwhile.
// after:
//   plain:    y = that (+ bias) (+ add); y f32 when out_f32. n columns.
//   gated:    y = silu(gate) * up, weights being [gate | up] by rows; n is the width of y.
//   rotated:  y is packed QKV: q is rotated and stored in y, K (rotated) and V go to the cache at `slots` and nowhere
//             else; as qk_norm_rope_kv_write.cu does for whole heads that rotate and have no norm of their own.
//
// weights [n, k] (gated: [2n, k]), x [rows, k], bias [n], add and y [rows, n] bf16; bias, add may be null, add may be y.
// k a multiple of 32 (gemv: 8). What a block takes of n (plain 16 T columns; else 8 T pairs, which for rotated divide
// head_dim / 2) must divide it. Launched as clusters of C blocks along y (plain without norm only), each takes a part of k
// and the blocks add up through distributed shared memory: what fills the card when n is small.
// Dynamic shared memory of fused_m*: 4 * (W * (16 T (M + 1) + M) + M + 128 T * M / 8) bytes. Grid: (n / columns, C).
//
// Weights go from global memory straight into fragments, the first of them before the wait for the kernel before.
// Gate, up and QKV are rounded to bf16 before they are used further, as separate kernels would.
// Expected: bytes, n * k * 2 at 4.36 TB/s, plus 1.5-2 us a launch.

template <After AFTER> DEVICE void gemv_pair(const Operands& o, const Places& p) {
  constexpr int U = 4;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, vectors = o.k >> 3;
  const int row0 = AFTER == PLAIN ? 2 * blockIdx.x : pair_row<AFTER>(p, blockIdx.x);
  const int apart = AFTER == PLAIN ? (row0 + 1 < o.n) : pair_apart<AFTER>(o, p);
  const u32x4 *from = (const u32x4*)(o.weights + (u64)row0 * o.k), *second = (const u32x4*)(o.weights + (u64)(row0 + apart) * o.k);
  u32x4 w[U][2];
  const auto load = [&](int at) {
#pragma unroll
    for (int u = 0; u < U; u++)
      if (at + 128 * u < vectors) w[u][0] = load_weights(from + at + 128 * u), w[u][1] = load_weights(second + at + 128 * u);
  };
  load(threadIdx.x);
  const Turn turn = AFTER == ROTATED ? Turn(o, p, threadIdx.x == 0 ? 0 : o.rows, blockIdx.x) : Turn(o, p, o.rows, 0);
  let_next_kernel_start();
  wait_for_previous_kernels();
  float sum[2] = {0.f, 0.f}, squares = 0.f;
  for (int at = threadIdx.x; at < vectors; at += 128 * U) {
    if (at != threadIdx.x) load(at);
#pragma unroll
    for (int u = 0; u < U; u++)
      if (at + 128 * u < vectors) {
        const u32x4 xv = ((const u32x4*)o.x)[at + 128 * u];
        u32x4 nv = {{0, 0, 0, 0}};
        if (o.norm != nullptr) nv = ((const u32x4*)o.norm)[at + 128 * u];  // through L1: all blocks read it
#pragma unroll
        for (int i = 0; i < 4; i++) {
          float low = low_bf16(xv.r[i]), high = high_bf16(xv.r[i]);
          if (o.norm != nullptr) {
            squares += low * low + high * high;
            low *= low_bf16(nv.r[i]), high *= high_bf16(nv.r[i]);
          }
#pragma unroll
          for (int r = 0; r < 2; r++) sum[r] += low_bf16(w[u][r].r[i]) * low + high_bf16(w[u][r].r[i]) * high;
        }
      }
  }
  __shared__ float shares[4][3];
  const float a = warp_sum(sum[0]), b = warp_sum(sum[1]), c = o.norm != nullptr ? warp_sum(squares) : 0.f;
  if (lane == 0) shares[warp][0] = a, shares[warp][1] = b, shares[warp][2] = c;
  __syncthreads();
  if (threadIdx.x >= (AFTER == PLAIN ? 2 : 1)) return;
  float all[3] = {0.f, 0.f, 0.f};
#pragma unroll
  for (int s = 0; s < 4; s++) all[0] += shares[s][0], all[1] += shares[s][1], all[2] += shares[s][2];
  const float factor = o.norm != nullptr ? rsqrtf(all[2] / (float)o.k + o.eps) : 1.f;
  if (AFTER == PLAIN) {
    const int column = row0 + threadIdx.x;
    if (column < o.n) o.store(0, column, (threadIdx.x ? all[1] : all[0]) * factor + o.extra(0, column));
  } else if (AFTER == GATED) {
    o.store(0, blockIdx.x, gate(all[0] * factor, all[1] * factor));
  } else {
    const float bias0 = o.bias != nullptr ? to_float(o.bias[row0]) : 0.f;
    const float bias1 = o.bias != nullptr ? to_float(o.bias[row0 + apart]) : 0.f;
    turn.store(all[0] * factor + bias0, all[1] * factor + bias1);
  }
}

// MT: tiles of 8 rows of x. T: tiles of 16 rows of weights. U: pieces of 32 elements of k that a warp has under way.
// Pairs: rows g and g + 8 of a tile are the two of a pair, so tile t has pairs 8 t .. 8 t + 7 of the block's.
template <int MT, int T, int W, int U, After AFTER> DEVICE void skinny(const Operands& o, const Places& p) {
  constexpr int M = 8 * MT, COLUMNS = AFTER == PLAIN ? 16 * T : 8 * T, OUTS = COLUMNS * M, THREADS = 32 * W;
  constexpr int EACH = (OUTS + THREADS - 1) / THREADS;
  constexpr int X = U / MT > 1 ? U / MT : 1;  // pieces of x that a lane has under way
  static_assert(U % X == 0);
  DYNAMIC_SHARED(base);
  float(*shares)[16 * T][M + 1] = (float(*)[16 * T][M + 1]) base;
  float(*squares_of)[M] = (float(*)[M])(base + sizeof(float) * W * 16 * T * (M + 1));
  float* factors = (float*)(squares_of + W);
  float* parts = factors + M;  // [clusters][OUTS / clusters], clusters > 1
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, c = lane & 3;
  const int clusters = AFTER == PLAIN ? cluster_size() : 1, rank = AFTER == PLAIN ? cluster_rank() : 0;
  const int pieces = ceil_div(o.k >> 5, clusters), begin = rank * pieces + warp, end = min(o.k >> 5, (rank + 1) * pieces);
  const int column0 = blockIdx.x * COLUMNS, k = o.k;
  const int apart = AFTER == PLAIN ? 8 : pair_apart<AFTER>(o, p);
  const bf16* from[T];
#pragma unroll
  for (int t = 0; t < T; t++)
    from[t] = o.weights + (u64)(AFTER == PLAIN ? column0 + t * 16 + g : pair_row<AFTER>(p, column0 + t * 8) + g) * k + c * 8;
  u32x4 w[U][T][2];
  const auto load = [&](int j) {
#pragma unroll
    for (int u = 0; u < U; u++)
      if (j + u * W < end) {
#pragma unroll
        for (int t = 0; t < T; t++) {
          w[u][t][0] = load_weights(from[t] + (j + u * W) * 32);
          w[u][t][1] = load_weights(from[t] + (u64)apart * k + (j + u * W) * 32);
        }
      }
  };
  load(begin);
  if (clusters > 1) cluster_arrive();
  // The thread's outputs: column r of the block's and row m of x.
  const int first = clusters > 1 ? rank * (OUTS / clusters) : 0, outs = OUTS / clusters;
  static_assert(AFTER != ROTATED || EACH == 1);
  const Turn turn(o, p, AFTER == ROTATED ? (int)threadIdx.x / COLUMNS : o.rows, column0 + (int)threadIdx.x % COLUMNS);
  let_next_kernel_start();
  wait_for_previous_kernels();
  float extra[EACH];
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    const int i = e * THREADS + threadIdx.x, r = (first + i) % COLUMNS, m = (first + i) / COLUMNS;
    extra[e] = AFTER == PLAIN && i < outs && m < o.rows ? o.extra(m, column0 + r) : 0.f;
  }
  float sum[T][MT][4], squares[MT][2];
#pragma unroll
  for (int b = 0; b < MT; b++) {
    squares[b][0] = squares[b][1] = 0.f;
#pragma unroll
    for (int t = 0; t < T; t++) sum[t][b][0] = sum[t][b][1] = sum[t][b][2] = sum[t][b][3] = 0.f;
  }
  for (int j = begin; j < end; j += U * W) {
    if (j != begin) load(j);
#pragma unroll
    for (int u0 = 0; u0 < U; u0 += X) {
      u32x4 xv[X][MT];
#pragma unroll
      for (int u = 0; u < X; u++)
#pragma unroll
        for (int b = 0; b < MT; b++) {
          const bool there = j + (u0 + u) * W < end && 8 * b + g < o.rows;
          xv[u][b] = there ? *(const u32x4*)(o.x + (u64)(8 * b + g) * k + (j + (u0 + u) * W) * 32 + c * 8) : u32x4{{0, 0, 0, 0}};
        }
#pragma unroll
      for (int u = 0; u < X; u++)
        if (j + (u0 + u) * W < end) {
          if (o.norm != nullptr) {
            const u32x4 nv = *(const u32x4*)(o.norm + (j + (u0 + u) * W) * 32 + c * 8);  // through L1: all blocks read it
#pragma unroll
            for (int b = 0; b < MT; b++) {
              u32x4& v = xv[u][b];
              add_squares(squares[b], v.r[0], v.r[1]), add_squares(squares[b], v.r[2], v.r[3]);
#pragma unroll
              for (int i = 0; i < 4; i++) v.r[i] = mul_bf16x2(v.r[i], nv.r[i]);
            }
          }
#pragma unroll
          for (int t = 0; t < T; t++) {
            const u32x4 &top = w[u0 + u][t][0], &low = w[u0 + u][t][1];
            const u32 a0[4] = {top.r[0], low.r[0], top.r[1], low.r[1]}, a1[4] = {top.r[2], low.r[2], top.r[3], low.r[3]};
#pragma unroll
            for (int b = 0; b < MT; b++) {
              mma_bf16(sum[t][b], a0, xv[u][b].r[0], xv[u][b].r[1]);
              mma_bf16(sum[t][b], a1, xv[u][b].r[2], xv[u][b].r[3]);
            }
          }
        }
    }
  }
#pragma unroll
  for (int b = 0; b < MT; b++) {
    if (o.norm != nullptr) {
      float mine;
      if (diagonal(squares[b], lane, mine)) squares_of[warp][8 * b + g] = mine;
    }
#pragma unroll
    for (int t = 0; t < T; t++)
#pragma unroll
      for (int e = 0; e < 4; e++) shares[warp][t * 16 + g + (e >> 1) * 8][b * 8 + c * 2 + (e & 1)] = sum[t][b][e];
  }
  __syncthreads();
  const auto total = [&](int row, int m) {
    float v = 0.f;
#pragma unroll
    for (int s = 0; s < W; s++) v += shares[s][row][m];
    return v;
  };
  if (clusters > 1) {
    cluster_wait();  // all blocks have begun: their memory may be written
    for (int i = threadIdx.x; i < OUTS; i += THREADS)
      if (i / COLUMNS < o.rows)
        store_in_cluster(smem_address(parts + rank * outs + i % outs), i / outs, total(i % COLUMNS, i / COLUMNS));
    cluster_arrive();
    cluster_wait();
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      const int i = e * THREADS + threadIdx.x, r = (first + i) % COLUMNS, m = (first + i) / COLUMNS;
      if (i >= outs || m >= o.rows) continue;
      float v = extra[e];
      for (int s = 0; s < clusters; s++) v += parts[s * outs + i];
      o.store(m, column0 + r, v);
    }
    return;
  }
  if (o.norm != nullptr) {
    if (threadIdx.x < M) {
      float v = 0.f;
#pragma unroll
      for (int s = 0; s < W; s++) v += squares_of[s][threadIdx.x];
      factors[threadIdx.x] = rsqrtf(v / (float)k + o.eps);
    }
    __syncthreads();
  }
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    const int i = e * THREADS + threadIdx.x, r = i % COLUMNS, m = i / COLUMNS;
    if (i >= OUTS || m >= o.rows) continue;
    const float factor = o.norm != nullptr ? factors[m] : 1.f;
    if (AFTER == PLAIN) {
      o.store(m, column0 + r, total(r, m) * factor + extra[e]);
      continue;
    }
    const int row = r / 8 * 16 + r % 8;
    const float a = total(row, m) * factor, b = total(row + 8, m) * factor;
    if (AFTER == GATED) {
      o.store(m, column0 + r, gate(a, b));
    } else {
      const int at = pair_row<AFTER>(p, column0 + r);
      turn.store(a + (o.bias != nullptr ? to_float(o.bias[at]) : 0.f), b + (o.bias != nullptr ? to_float(o.bias[at + apart]) : 0.f));
    }
  }
}

FUSED(fused_gemv_plain, 128, gemv_pair<PLAIN>)
FUSED(fused_gemv_gated, 128, gemv_pair<GATED>)
FUSED(fused_gemv_rotated, 128, gemv_pair<ROTATED>)
FUSED(fused_m8_plain_t1_w8, 256, skinny<1 COMMA 1 COMMA 8 COMMA 5 COMMA PLAIN>)
FUSED(fused_m8_plain_t1_w16, 512, skinny<1 COMMA 1 COMMA 16 COMMA 5 COMMA PLAIN>)
FUSED(fused_m8_gated_t2_w8, 256 COMMA 3, skinny<1 COMMA 2 COMMA 8 COMMA 2 COMMA GATED>)
FUSED(fused_m8_rotated_t1_w16, 512 COMMA 2, skinny<1 COMMA 1 COMMA 16 COMMA 2 COMMA ROTATED>)
FUSED(fused_m16_plain_t1_w16, 512, skinny<2 COMMA 1 COMMA 16 COMMA 4 COMMA PLAIN>)
FUSED(fused_m16_gated_t2_w8, 256, skinny<2 COMMA 2 COMMA 8 COMMA 2 COMMA GATED>)
FUSED(fused_m16_rotated_t1_w8, 256, skinny<2 COMMA 1 COMMA 8 COMMA 4 COMMA ROTATED>)
