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
  int columns, split;  // split 0: of wide_linear.cu; 1: of split_linear.cu, gated
  int rows, n, k;
  bool bias, residual;
};

// What the launch of one of either file's kernels needs.
struct WideLaunch {
  int blocks, threads, shared, cluster, x_box_rows;
  WideLaunch(bool gated, int columns, int split, int rows, int n) {
    const int tile_rows = split ? 64 : 128, width = gated ? columns / 2 : columns, stage = (tile_rows + columns) * 128;
    cluster = split ? split : 2, threads = split ? 288 : 384, x_box_rows = tile_rows;
    if (!split) {
      blocks = 2 * cluster, shared = 4 * (stage + 16) + 8 * 4096 + 8 + 1024;  // two clusters take all tiles
      return;
    }
    const int parts = split > 1 ? 2 * 64 * (columns + 16) * 4 : 0;
    const int stages = (114688 - 2048 - parts) / stage;
    shared = stages * (stage + 16) + parts + 1024;
    blocks = (rows + 63) / 64 * ((n + width - 1) / width) * cluster;
  }
};

inline double silu_of(double x) { return x / (1 + std::exp(-x)); }

inline void test_wide_case(const WideCase& c) {
  const int w_rows = c.gated ? 2 * c.n : c.n;
  Buffer<bf16> x(size_t(c.rows) * c.k), w(size_t(w_rows) * c.k), bias(c.n), residual(size_t(c.rows) * c.n), y(size_t(c.rows) * c.n);
  fill(x), fill(w), fill(bias), fill(residual);
  const WideLaunch l(c.gated, c.columns, c.split, c.rows, c.n);
  const TensorMap x_map = {x.data(), c.k, c.rows, l.x_box_rows}, w_map = {w.data(), c.k, w_rows, c.columns / 2};
  emu::launch({1, l.blocks, 1}, l.threads, l.shared, [&] {
    c.kernel(x_map, w_map, c.bias ? bias.data() : nullptr, c.residual ? residual.data() : nullptr, y.data(), c.rows, c.n, c.k);
  }, l.cluster);
  Nmse e;
  for (int m = 0; m < c.rows; m++)
    for (int n = 0; n < c.n; n++) {
      const auto dot = [&](int row) {
        double sum = 0;
        for (int k = 0; k < c.k; k++) sum += value(x[m * c.k + k]) * value(w[size_t(row) * c.k + k]);
        return sum;
      };
      const double a = dot(n), more = (c.bias ? value(bias[n]) : 0) + (c.residual ? value(residual[m * c.n + n]) : 0);
      e.add(value(y[m * c.n + n]), c.gated ? silu_of(a) * dot(c.n + n) : a + more);
    }
  e.below(BF16_BOUND, std::string(c.name) + " rows " + std::to_string(c.rows));
}

inline void test_wide_linear() {
  using namespace wide;
  using namespace split;
#define CASE(NAME, ...) {NAME, #NAME, __VA_ARGS__}
  const WideCase cases[] = {
      CASE(wide_gated_n224, true, 224, 0, 300, 144, 200, false, false),
      CASE(wide_gated_n256, true, 256, 0, 129, 136, 72, false, false),
      CASE(wide_plain_n192, false, 192, 0, 270, 200, 328, true, true),
      CASE(wide_plain_n256, false, 256, 0, 257, 264, 64, false, true),
      CASE(split_gated, true, 64, 1, 70, 72, 904, false, false),
      CASE(split_plain_s4, false, 64, 4, 33, 136, 256, true, false),
      CASE(split_plain_s4, false, 64, 4, 130, 72, 1096, true, true),
      CASE(split_plain_s8, false, 64, 8, 64, 128, 1160, false, true),
  };
#undef CASE
  for (const auto& c : cases) test_wide_case(c);
}
