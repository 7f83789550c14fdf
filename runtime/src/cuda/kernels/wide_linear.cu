// y = x W^T for many rows, on Hopper.
//
//   wide_gated_n256, _n224, _n160   y = silu(x G^T) * (x U^T)     w rows: n of G, then n of U
//   wide_plain_n256, _n192          y = x W^T (+ bias) (+ residual)
//
// x, w, maps and grid as in wide.cuh; bias [n], residual and y [rows, n], all bf16; sums rounded once. n a multiple of 8.
// bias and residual may be null; residual may be y.
// Expected: 64 of k take 1,024 cycles, which is what the tensor cores need, and a tile's end 2,600: at 8,192 rows, as the
// card's power allows, 700 TFLOP/s over 28,672 x 4,096 with the gate, and 650 over 9,728 x 896: cuBLASLt's without it.

struct Product {
  const bf16 *bias, *residual;
  bf16* out;
  int rows, n, k;
};

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

struct Gated : Product {
  struct Kept {};
  static constexpr bool GATED = true;
  template <int TILES> DEVICE void finish(const float (&d)[TILES][4], smem_t own, int row, int column, Kept&) const {
    finish_gated(d, own, *this, row, column);
  }
};

struct Plain : Product {
  struct Kept {};
  static constexpr bool GATED = false;
  template <int TILES> DEVICE void finish(const float (&d)[TILES][4], smem_t own, int row, int column, Kept&) const {
    finish_plain<0>(d, own, *this, row, column);
    finish_plain<TILES / 2>(d, own, *this, row, column + TILES * 4);
  }
};

#define WIDE(NAME, RESULT, COLUMNS)                                                                                          \
  KERNEL void __launch_bounds__(THREADS, 1)                                                                                  \
  NAME(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, const bf16* __restrict__ bias,      \
       const bf16* residual, bf16* out, int rows, int n, int k) {                                                            \
    multiply<RESULT, COLUMNS>(&x_map, &w_map, {{bias, residual, out, rows, n, k}});                                    \
  }
WIDE(wide_gated_n256, Gated, 256)
WIDE(wide_gated_n224, Gated, 224)
WIDE(wide_gated_n160, Gated, 160)
WIDE(wide_plain_n256, Plain, 256)
WIDE(wide_plain_n192, Plain, 192)
#undef WIDE
