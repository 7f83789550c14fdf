// Products of many rows: tiles by the copy engine, pairs of blocks that share them, clusters that divide k.
#pragma once
#include "check.hpp"
#include "wgmma_emulated.hpp"
#define __grid_constant__
namespace wide {
#include "wide_linear.cu"
}
namespace split {
#include "split_linear.cu"
}

struct WideCase {
  decltype(&wide::wide_gated_n256) kernel;
  const char* name;
  bool gated;
  int tile_rows, columns, cluster, split;  // split 0: of wide_linear.cu
  bool shares_rows;                        // pairs of column tiles
  int rows, n, k;
  bool bias, residual;
};

inline void test_wide_case(const WideCase& c) {
  const int w_rows = c.gated ? 2 * c.n : c.n, width = c.gated ? c.columns / 2 : c.columns;
  Buffer<bf16> x(size_t(c.rows) * c.k), w(size_t(w_rows) * c.k), bias(c.n), residual(size_t(c.rows) * c.n), y(size_t(c.rows) * c.n);
  fill(x), fill(w), fill(bias), fill(residual);
  const TensorMap x_map = {x.data(), c.k, c.rows, c.shares_rows ? c.tile_rows / 2 : c.tile_rows};
  const TensorMap w_map = {w.data(), c.k, w_rows, c.columns / 2};
  const int mates = c.split ? c.cluster / c.split : 2, pair_rows = mates == 2 && !c.shares_rows ? 2 : 1;
  const int pair_columns = mates == 2 && c.shares_rows ? 2 : 1, stage = (c.tile_rows + c.columns) * 128;
  const int row_tiles = (c.rows + c.tile_rows * pair_rows - 1) / (c.tile_rows * pair_rows);
  const int column_tiles = (c.n + width * pair_columns - 1) / (width * pair_columns);
  const int stages = c.split ? (c.columns <= 64 ? 108544 : 231168) / stage : 4;
  const int shared = stages * (stage + 16) + 1032 + (c.split ? 0 : 8 * 4096);
  // Two clusters take all tiles of wide_linear.cu.
  const int blocks = c.split ? row_tiles * column_tiles * c.cluster : 2 * c.cluster;
  emu::launch({1, blocks, 1}, c.split ? 288 : 384, shared, [&] {
    c.kernel(x_map, w_map, c.bias ? bias.data() : nullptr, c.residual ? residual.data() : nullptr, y.data(), c.rows, c.n, c.k);
  }, c.cluster);
  Nmse e;
  for (int m = 0; m < c.rows; m++)
    for (int n = 0; n < c.n; n++) {
      const auto dot = [&](int row) {
        double sum = 0;
        for (int k = 0; k < c.k; k++) sum += value(x[m * c.k + k]) * value(w[size_t(row) * c.k + k]);
        return sum;
      };
      const double a = dot(n), more = (c.bias ? value(bias[n]) : 0) + (c.residual ? value(residual[m * c.n + n]) : 0);
      e.add(value(y[m * c.n + n]), c.gated ? a / (1 + std::exp(-a)) * dot(c.n + n) : a + more);
    }
  e.below(BF16_BOUND, std::string(c.name) + " rows " + std::to_string(c.rows));
}

inline void test_wide_linear() {
  using namespace wide;
  using namespace split;
#define CASE(NAME, ...) {NAME, #NAME, __VA_ARGS__}
  const WideCase cases[] = {
      CASE(wide_gated_n224, true, 128, 224, 2, 0, false, 300, 144, 200, false, false),
      CASE(wide_gated_n256, true, 128, 256, 2, 0, false, 129, 136, 72, false, false),
      CASE(wide_plain_n192, false, 128, 192, 2, 0, false, 270, 200, 328, true, true),
      CASE(wide_plain_n256, false, 128, 256, 2, 0, false, 257, 264, 64, false, true),
      CASE(split_gated_m128_n256_columns_s1, true, 128, 256, 2, 1, true, 100, 300 / 8 * 8, 392, false, false),
      CASE(split_gated_m64_n64_s1, true, 64, 64, 1, 1, false, 70, 72, 904, false, false),
      CASE(split_plain_m128_n128_rows_s2, false, 128, 128, 4, 2, false, 200, 136, 200, true, true),
      CASE(split_plain_m128_n256_rows_s4, false, 128, 256, 8, 4, false, 130, 264, 328, false, true),
      CASE(split_plain_m128_n128_s4, false, 128, 128, 4, 4, false, 33, 136, 256, true, false),
      CASE(split_plain_m64_n64_s8, false, 64, 64, 8, 8, false, 64, 128, 1160, false, true),
      CASE(split_plain_m64_n192_s4, false, 64, 192, 4, 4, false, 17, 200, 520, true, true),
      CASE(split_plain_m128_n192_columns_s4, false, 128, 192, 8, 4, true, 96, 200, 264, true, false),
  };
#undef CASE
  for (const auto& c : cases) test_wide_case(c);
}
