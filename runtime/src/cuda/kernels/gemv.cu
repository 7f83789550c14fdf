// y[m, n] = sum over k of weights[n, k] x[m, k] (+ bias[n]) (+ add[m, n]) for few rows m: bound by reading the weights once.
//
//   gemv_r{R}_u{U}_s{S}:  one row of x, arithmetic on the cores. R rows of weights per S warps, U loads under way a row.
//                         k a multiple of 8. Grid: ceil(n / (R * 4 / S)) blocks of 128 threads.
//   skinny_t{T}_w{W}:     1..8 rows of x on the tensor cores: weights go from global memory straight into fragments of
//                         mma.m16n8k16, x is the 8-wide operand. 16 T rows of weights a block of W warps, which divide k.
//                         k a multiple of 32, n of 16 T. Grid: n / (16 T) blocks of 32 W threads.
//
// weights [n, k], x [m, k], bias [n], add and y [m, n] bf16; y f32 when out_f32. bias, add may be null; add may be y.
// The first weights are fetched before waiting for the kernel before: under programmatic dependent launch a chain of
// these keeps memory busy across kernel borders.
// Expected: bytes, n * k * 2 at 4.36 TB/s, plus about 3 us a launch without that overlap.

struct Epilogue {
  const bf16 *bias, *add;
  void* y;
  int n, out_f32;
  DEVICE void store(int m, int row, float v) const {
    const u64 at = (u64)m * n + row;
    if (bias != nullptr) v += to_float(bias[row]);
    if (add != nullptr) v += to_float(add[at]);
    if (out_f32) ((float*)y)[at] = v;
    else ((bf16*)y)[at] = to_bf16(v);
  }
};

DEVICE float dot8(const u32x4& a, const u32x4& b, float sum) {
#pragma unroll
  for (int i = 0; i < 4; i++) sum += low_bf16(a.r[i]) * low_bf16(b.r[i]) + high_bf16(a.r[i]) * high_bf16(b.r[i]);
  return sum;
}

template <int R, int U, int S>
DEVICE void gemv_rows(const bf16* __restrict__ weights, const bf16* x, const Epilogue& epilogue, int k) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, part = warp % S;
  const int row0 = (blockIdx.x * (4 / S) + warp / S) * R, vectors = k >> 3, step = 32 * S * U;
  u32x4 w[U][R];
  const auto load = [&](int at) {
#pragma unroll
    for (int u = 0; u < U; u++)
#pragma unroll
      for (int r = 0; r < R; r++)
        if (at + 32 * S * u < vectors && row0 + r < epilogue.n)
          w[u][r] = load_weights((const u32x4*)(weights + (u64)(row0 + r) * k) + at + 32 * S * u);
  };
  const int first = part * 32 + lane;
  load(first);
  let_next_kernel_start();
  wait_for_previous_kernels();
  float sum[R];
#pragma unroll
  for (int r = 0; r < R; r++) sum[r] = 0.f;
  for (int at = first; at < vectors; at += step) {
    if (at != first) load(at);
#pragma unroll
    for (int u = 0; u < U; u++)
      if (at + 32 * S * u < vectors) {
        const u32x4 xv = ((const u32x4*)x)[at + 32 * S * u];
#pragma unroll
        for (int r = 0; r < R; r++)
          if (row0 + r < epilogue.n) sum[r] = dot8(w[u][r], xv, sum[r]);
      }
  }
  __shared__ float shares[4][R];
#pragma unroll
  for (int r = 0; r < R; r++) {
    const float total = warp_sum(sum[r]);
    if (S == 1) {
      if (lane == 0 && row0 + r < epilogue.n) epilogue.store(0, row0 + r, total);
    } else if (lane == 0) {
      shares[warp][r] = total;
    }
  }
  if (S > 1) {
    __syncthreads();
    if (part == 0 && lane < R && row0 + lane < epilogue.n) {
      float total = 0.f;
#pragma unroll
      for (int s = 0; s < S; s++) total += shares[warp + s][lane];
      epilogue.store(0, row0 + lane, total);
    }
  }
}

#define GEMV(R, U, S)                                                                                             \
  KERNEL void __launch_bounds__(128)                                                                              \
      gemv_r##R##_u##U##_s##S(const bf16* weights, const bf16* x, const bf16* bias, const bf16* add, void* y,     \
                              int rows, int n, int k, int out_f32) {                                              \
    gemv_rows<R, U, S>(weights, x, Epilogue{bias, add, y, n, out_f32}, k);                                        \
  }
GEMV(1, 4, 1)
GEMV(2, 4, 1)
GEMV(4, 2, 1)
GEMV(1, 4, 4)
GEMV(2, 4, 4)
GEMV(1, 4, 2)

// Piece j of a lane's k: 8 elements at j * 32 + (lane & 3) * 8, of rows lane / 4 and lane / 4 + 8 of each 16. A product
// does not mind the order of k as long as weights and x agree.
template <int T, int W, int U>
DEVICE void skinny_rows(const bf16* __restrict__ weights, const bf16* x, const Epilogue& epilogue, int rows, int k) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, c = lane & 3, pieces = k >> 5;
  const int row0 = blockIdx.x * 16 * T;
  const bf16* from[T];
#pragma unroll
  for (int t = 0; t < T; t++) from[t] = weights + (u64)(row0 + t * 16 + g) * k + c * 8;
  u32x4 w[U][T][2];
  const auto load = [&](int j) {
#pragma unroll
    for (int u = 0; u < U; u++)
      if (j + u * W < pieces) {
#pragma unroll
        for (int t = 0; t < T; t++) {
          w[u][t][0] = load_weights(from[t] + (j + u * W) * 32);
          w[u][t][1] = load_weights(from[t] + (u64)8 * k + (j + u * W) * 32);
        }
      }
  };
  load(warp);
  let_next_kernel_start();
  wait_for_previous_kernels();
  float sum[T][4];
#pragma unroll
  for (int t = 0; t < T; t++) sum[t][0] = sum[t][1] = sum[t][2] = sum[t][3] = 0.f;
  const bf16* x_lane = x + (u64)(g < rows ? g : 0) * k + c * 8;
  for (int j = warp; j < pieces; j += U * W) {
    if (j != warp) load(j);
#pragma unroll
    for (int u = 0; u < U; u++)
      if (j + u * W < pieces) {
        u32x4 b = {{0, 0, 0, 0}};
        if (g < rows) b = *(const u32x4*)(x_lane + (j + u * W) * 32);
#pragma unroll
        for (int t = 0; t < T; t++) {
          const u32x4 &top = w[u][t][0], &low = w[u][t][1];
          const u32 a0[4] = {top.r[0], low.r[0], top.r[1], low.r[1]}, a1[4] = {top.r[2], low.r[2], top.r[3], low.r[3]};
          mma_bf16(sum[t], a0, b.r[0], b.r[1]);
          mma_bf16(sum[t], a1, b.r[2], b.r[3]);
        }
      }
  }
  __shared__ float shares[W][T][16][9];
#pragma unroll
  for (int t = 0; t < T; t++)
#pragma unroll
    for (int e = 0; e < 4; e++) shares[warp][t][g + (e >> 1) * 8][c * 2 + (e & 1)] = sum[t][e];
  __syncthreads();
  for (int i = threadIdx.x; i < 16 * T * rows; i += W * 32) {
    const int r = i & 15, t = (i >> 4) % T, m = (i >> 4) / T;
    float total = 0.f;
#pragma unroll
    for (int s = 0; s < W; s++) total += shares[s][t][r][m];
    epilogue.store(m, row0 + t * 16 + r, total);
  }
}

#define SKINNY(NAME, T, W, U)                                                                                     \
  KERNEL void __launch_bounds__(W * 32)                                                                           \
      NAME(const bf16* weights, const bf16* x, const bf16* bias, const bf16* add, void* y, int rows, int n,       \
           int k, int out_f32) {                                                                                  \
    skinny_rows<T, W, U>(weights, x, Epilogue{bias, add, y, n, out_f32}, rows, k);                                \
  }
SKINNY(skinny_t1_w4, 1, 4, 4)
SKINNY(skinny_t1_w8, 1, 8, 4)
SKINNY(skinny_t1_w16, 1, 16, 4)
SKINNY(skinny_t2_w8, 2, 8, 2)
SKINNY(skinny_t2_w16, 2, 16, 2)
