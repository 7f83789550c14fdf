// Products of many rows: tiles by the copy engine, pairs of blocks that share them, clusters that divide k.
#pragma once
#include "check.hpp"
#include "wgmma_emulated.hpp"
#define __grid_constant__
namespace wide {
#include "logits.cuh"
#include "wide.cuh"
#include "wide_linear.cu"
#include "wide_rotated.cu"
#include "wide_head.cu"
}
#undef BLOCK_ROWS
#undef CLUSTER
#undef DEPTH
#undef STAGES
#undef THREADS
#undef X_BYTES
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

// A step's head: rows that want their logits among others that do not, a last tile that is not whole, ties and what is not
// a number. Small whole numbers, so that sums are exact.
inline void test_wide_head(int rows, int n, int k, bool none_wants) {
  const int stride = (n + 7) / 8 * 8, parts = (n + 255) / 256;
  Buffer<bf16> x(size_t(rows) * k), w(size_t(n) * k);
  for (size_t i = 0; i < x.size(); i++) x[i] = bf16(bf16_bits(float(integer_between(-2, 2))));
  for (size_t i = 0; i < w.size(); i++) w[i] = bf16(bf16_bits(float(integer_between(-2, 2))));
  const bf16 infinity = bf16(bf16_bits(INFINITY)), one = bf16(bf16_bits(1));
  for (int i = 0; i < k; i++) x[5 * k + i] = bf16(bf16_bits(i == 0)), x[6 * k + i] = bf16(bf16_bits(-(i == 0)));
  for (int c = 0; c < n; c++) w[size_t(c) * k] = bf16(bf16_bits(float(integer_between(1, 3))));  // of row 6 all are negative
  for (const int c : {3, 70, n - 1}) w[size_t(c) * k] = infinity, w[size_t(c) * k + 1] = one;
  for (int i = 0; i < k; i++) x[7 * k + i] = bf16(bf16_bits(NAN));
  Buffer<wide::SampleRow> sampling(rows);
  Buffer<float> logits(size_t(rows) * stride);
  Buffer<u64> bests(size_t(rows) * parts);
  const auto wants = [&](int m) { return !none_wants && (m % 3 == 0 || (m >= 64 && m < 128)) && m != rows - 1; };
  for (int m = 0; m < rows; m++) {
    sampling[m] = {0, 0, 1, 0, 1, 0, 0, -1, 1, 0, 0, 0, 0, 0, -1, 1};
    if (!wants(m)) continue;
    if (m % 2) sampling[m].temperature = 1;
    else if (m % 4) sampling[m].state_slot = 0;
    else sampling[m].logprobs = 0;
  }
  sampling[rows - 1] = {};  // nobody's
  const WideLaunch l(false, 256, 0, rows, n);
  const bool beside = rows <= 128;
  const TensorMap x_map = {x.data(), k, rows, beside ? 64 : 128}, w_map = {w.data(), k, n, 128};
  emu::launch({1, l.blocks, 1}, l.threads, l.shared, [&] {
    const auto head = beside ? wide::wide_head_beside_n256 : wide::wide_head_n256;
    head(x_map, w_map, none_wants ? nullptr : sampling.data(), logits.data(), bests.data(), rows, n, k, stride);
  }, l.cluster);
  const std::string what = "wide_head rows " + std::to_string(rows) + " n " + std::to_string(n);
  int unwritten = 0, wrong = 0, missed = 0;
  for (int m = 0; m < rows; m++)
    for (int part = 0; part < parts; part++) {
      float most = -INFINITY;
      int id = -1;
      for (int c = part * 256; c < std::min(n, part * 256 + 256); c++) {
        float sum = 0;
        for (int i = 0; i < k; i++) sum += bf16_value(x[m * k + i]) * bf16_value(w[size_t(c) * k + i]);
        const float stored = logits[size_t(m) * stride + c];
        if (wants(m)) wrong += std::isnan(sum) ? !std::isnan(stored) : stored != sum;
        else unwritten += std::isnan(stored);
        if (sum > most) most = sum, id = c;
      }
      if (!wants(m)) unwritten -= std::min(n, part * 256 + 256) - part * 256;
      const u64 best = bests[size_t(m) * parts + part];
      missed += wide::candidate_value(best) != std::min(most, 3.402823466e38f) || (id >= 0 && wide::candidate_id(best) != id);
    }
  expect(wrong == 0, what + ": logits");
  expect(unwritten == 0, what + ": logits that nobody wants");
  expect(missed == 0, what + ": the likeliest of each part");
}

struct RotatedCase {
  decltype(&wide::wide_rotated_n192_d64) kernel;
  const char* name;
  int head_dim, columns, rows, heads, kv_heads, k;
  bool bias;
};

// Packed QKV: q rotated, k and v in the places of their slots, all else as it was.
inline void test_wide_rotated(const RotatedCase& c) {
  const int hd = c.head_dim, half = hd / 2, all = c.heads + 2 * c.kv_heads, n = all * hd, places = (c.rows / 16 + 2) * 16;
  const int turned = c.heads + c.kv_heads, cache = places * c.kv_heads * hd;
  Buffer<bf16> x(size_t(c.rows) * c.k), w(size_t(n) * c.k), bias(n), y(size_t(c.rows) * n), keys(cache), values(cache);
  Buffer<float> cosine(50 * half), sine(50 * half);
  Buffer<int> positions(c.rows), slots(c.rows);
  fill(x), fill(w), fill(bias);
  for (int i = 0; i < 50 * half; i++) cosine[i] = float(uniform_between(-1, 1)), sine[i] = float(uniform_between(-1, 1));
  for (int m = 0; m < c.rows; m++) positions[m] = integer_between(0, 49), slots[m] = m % 7 == 3 ? -1 : places - 1 - m;
  const WideLaunch l(false, c.columns, 0, c.rows, n);
  const TensorMap x_map = {x.data(), c.k, c.rows, 128}, w_map = {w.data(), c.k, n, c.columns / 2};
  emu::launch({1, l.blocks, 1}, l.threads, l.shared, [&] {
    c.kernel(x_map, w_map, c.bias ? bias.data() : nullptr, y.data(), positions.data(), slots.data(), cosine.data(), sine.data(),
             keys.data(), values.data(), c.rows, n, c.k, c.heads, c.kv_heads);
  }, l.cluster);
  const std::string what = std::string(c.name) + " rows " + std::to_string(c.rows);
  Nmse e;
  size_t written = 0, wanted = 0;
  for (int m = 0; m < c.rows; m++)
    for (int head = 0; head < all; head++) {
      double sums[128];
      for (int i = 0; i < hd; i++) {
        sums[i] = c.bias ? value(bias[head * hd + i]) : 0;
        for (int k = 0; k < c.k; k++) sums[i] += value(x[m * c.k + k]) * value(w[size_t(head * hd + i) * c.k + k]);
      }
      const bf16* got = &y[size_t(m) * n + head * hd];
      if (head >= c.heads) {
        for (int i = 0; i < hd; i++) written += got[i] != 0xffff;  // k and v: in the caches only
        if (slots[m] < 0) continue;
        const int kv_head = head < turned ? head - c.heads : head - turned;
        got = (head < turned ? keys : values).data() + ((slots[m] / 16 * c.kv_heads + kv_head) * 16 + slots[m] % 16) * hd;
        wanted += hd;
      }
      for (int i = 0; i < hd; i++) {
        const int at = positions[m] * half + i % half;
        const double a = sums[i % half], b = sums[i % half + half];
        const double both = i < half ? a * cosine[at] - b * sine[at] : b * cosine[at] + a * sine[at];
        e.add(value(got[i]), head < turned ? both : sums[i]);
      }
    }
  for (int i = 0; i < cache; i++) written += (keys[i] != 0xffff) + (values[i] != 0xffff);
  e.below(2 * BF16_BOUND, what);  // rounded twice
  expect(written == wanted, what + ": only q, and the places that slots name");
}

inline void test_wide_linear() {
  test_wide_head(200, 600, 72, false);
  test_wide_head(270, 333, 64, false);
  test_wide_head(100, 900, 72, false);
  test_wide_head(35, 512, 136, true);
  test_wide_head(257, 512, 136, true);
  using namespace wide;
  using namespace split;
#define CASE(NAME, ...) {NAME, #NAME, __VA_ARGS__}
  const WideCase cases[] = {
      CASE(wide_gated_n224, true, 224, 0, 300, 144, 200, false, false),
      CASE(wide_gated_n160, true, 160, 0, 260, 152, 136, false, false),
      CASE(wide_gated_n256, true, 256, 0, 129, 136, 72, false, false),
      CASE(wide_plain_n192, false, 192, 0, 270, 200, 328, true, true),
      CASE(wide_plain_n256, false, 256, 0, 257, 264, 64, false, true),
      CASE(split_gated, true, 64, 1, 70, 72, 904, false, false),
      CASE(split_plain_s4, false, 64, 4, 33, 136, 256, true, false),
      CASE(split_plain_s4, false, 64, 4, 130, 72, 1096, true, true),
      CASE(split_plain_s8, false, 64, 8, 64, 128, 1160, false, true),
  };
  const RotatedCase rotated[] = {
      CASE(wide_rotated_n192_d64, 64, 192, 270, 4, 2, 64, true),
      CASE(wide_rotated_n192_d64, 64, 192, 257, 1, 1, 200, false),
      CASE(wide_rotated_n64_d64, 64, 64, 300, 2, 1, 200, true),
      CASE(wide_rotated_n256_d128, 128, 256, 270, 3, 1, 72, true),
      CASE(wide_rotated_n256_d128, 128, 256, 65, 2, 2, 136, false),
  };
#undef CASE
  for (const auto& c : cases) test_wide_case(c);
  for (const auto& c : rotated) test_wide_rotated(c);
}
