// The head of a step of some dozens of rows or more, on Hopper: logits = x W^T, and of each row the likeliest token of each
// 256 columns. wide_head_n256; wide_head_beside_n256 for up to 128 rows.
//
// x, w, maps and grid as in wide.cuh; any n. logits [rows, row_stride] f32, row_stride even and at least n: written only for
// rows whose parameters say that somebody will read them (null: for none). bests [rows, ceil(n / 256)]: the likeliest token
// of a row's part, as candidate() orders them; sample.cu compares the parts. NaN is never the likeliest.
//
// What greedy rows are for: at 512 rows of a vocabulary of 151,936 their logits are 311 MB to write and to read again.
// Expected: as wide_linear.cu; the end of a tile takes some 1,500 cycles beside the other warpgroup's products.

struct Head {
  const SampleRow* sample_rows;
  float* logits;
  u64* bests;
  int rows, n, k, row_stride;
  static constexpr bool GATED = false, EARLY = false;
  // Which of the warp's rows want logits, and the first of these rows: seldom others in the next tile.
  struct Kept {
    int row = -1;
    u32 wanting = 0;
  };

  DEVICE u32 wanting(int row) const {
    const int lane = threadIdx.x & 31;
    bool wants = false;
    if (sample_rows != nullptr && lane < 16 && row + lane < rows) {
      const SampleRow& p = sample_rows[row + lane];  // not written by kernels
      wants = p.active && !is_plain(p);
    }
    return __ballot_sync(FULL_WARP, wants);
  }

  template <int TILES> DEVICE void store(const float (&d)[TILES][4], u32 wanting, int row, int column) const {
    const int lane = threadIdx.x & 31, c0 = column + (lane & 3) * 2;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int r = (lane >> 2) + h * 8;
      if (!(wanting >> r & 1)) continue;
      float* to = logits + (u64)(row + r) * row_stride + c0;
#pragma unroll
      for (int j = 0; j < TILES; j++)
        if (c0 + j * 8 < n) *(float2*)(to + j * 8) = make_float2(d[j][h * 2], d[j][h * 2 + 1]);
    }
  }

  template <int TILES> DEVICE void finish(float (&d)[TILES][4], smem_t, int row, int column, Kept& kept) const {
    const int lane = threadIdx.x & 31, c0 = column + (lane & 3) * 2;
    if (kept.row != row) kept.row = row, kept.wanting = wanting(row);
    if (kept.wanting) store(d, kept.wanting, row, column);
    if (column + TILES * 8 > n) {
#pragma unroll
      for (int j = 0; j < TILES; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          if (c0 + j * 8 + (i & 1) >= n) d[j][i] = minus_infinity();
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float most = minus_infinity();
      int at = 0;
      // Columns rise, so that the first of equals stays.
#pragma unroll
      for (int j = 0; j < TILES; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const float v = d[j][h * 2 + i];
          at = v > most ? j * 8 + i : at;
          most = fmaxf(most, v);
        }
      u64 best = candidate(tame(most), c0 + at);
#pragma unroll
      for (int o = 1; o < 4; o <<= 1) {
        const u64 other = __shfl_xor_sync(FULL_WARP, best, o);
        best = other > best ? other : best;
      }
      const int r = row + (lane >> 2) + h * 8;
      if ((lane & 3) == 0 && r < rows) bests[(u64)r * ceil_div(n, TILES * 8) + column / (TILES * 8)] = best;
    }
  }
};

#define HEAD(NAME, ...)                                                                                                      \
  KERNEL void __launch_bounds__(THREADS, 1)                                                                                  \
  NAME(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, const SampleRow* sample_rows,       \
       float* logits, u64* bests, int rows, int n, int k, int row_stride) {                                                  \
    multiply<Head, __VA_ARGS__>(&x_map, &w_map, {sample_rows, logits, bests, rows, n, k, row_stride});                       \
  }
HEAD(wide_head_n256, 256)
HEAD(wide_head_beside_n256, 256, true)
#undef HEAD
