// Products of few rows with norm, gate, rotation and cache around them.
#pragma once
#include "check.hpp"
namespace fused {
#include "linear.cuh"
#include "fused_linear.cu"
#include "tile_linear.cu"
}

struct FusedCase {
  decltype(&fused::fused_gemv_plain) kernel;
  const char* name;
  fused::After after;
  int columns, warps, most_rows, n, k, clusters;
  bool norm, extras;
  int tile = 0;  // rows of weights a block, of tile_linear.cu
};

using fused::After, fused::PLAIN, fused::GATED, fused::ROTATED;

inline int fused_shared_bytes(const FusedCase& c) {
  if (c.tile) return 5 * (c.tile + c.most_rows + 1) * 128 + c.most_rows * (c.tile + 5) * 4;
  const int tile_rows = c.after == PLAIN ? c.columns : 2 * c.columns, m = c.most_rows;
  return 4 * (c.warps * (tile_rows * (m + 1) + m) + m + c.columns * m);
}

inline void test_fused_case(const FusedCase& c, int rows) {
  const int heads = 3, kv_heads = 1, head_dim = c.n / 5, half = head_dim / 2;
  const int weight_rows = c.after == GATED ? 2 * c.n : c.n, slots_in_cache = 256;
  Buffer<bf16> w(size_t(weight_rows) * c.k), x(rows * c.k), norm(c.k), bias(weight_rows), add(rows * c.n), y(rows * c.n);
  Buffer<float> y32(rows * c.n), cosine(8 * std::max(half, 1)), sine(8 * std::max(half, 1));
  Buffer<bf16> keys(slots_in_cache * std::max(head_dim, 1)), values(slots_in_cache * std::max(head_dim, 1));
  Buffer<int> positions(rows), slots(rows);
  fill(w, 0.3), fill(x, 2), fill(norm), fill(bias), fill(add);
  for (size_t i = 0; i < cosine.size(); i++) cosine[i] = float(uniform_between(-1, 1)), sine[i] = float(uniform_between(-1, 1));
  for (int m = 0; m < rows; m++) positions[m] = integer_between(0, 7), slots[m] = m == 1 ? -1 : (7 * m + 3) % slots_in_cache;
  const float eps = 1e-3f;
  const int out_f32 = c.after == PLAIN && c.extras, threads = c.warps * 32;
  const auto run = [&] {
    c.kernel(w.data(), x.data(), c.norm ? norm.data() : nullptr, c.extras ? bias.data() : nullptr,
             c.extras && c.after == PLAIN ? add.data() : nullptr, out_f32 ? (void*)y32.data() : y.data(), rows, c.n, c.k, eps,
             out_f32, positions.data(), slots.data(), cosine.data(), sine.data(), keys.data(), values.data(), heads,
             kv_heads, head_dim);
  };
  const int blocks = ((c.after == ROTATED ? c.n / 2 : c.n) + c.columns - 1) / c.columns;
  const int m_blocks = (rows + c.most_rows - 1) / c.most_rows;
  emu::launch({blocks, c.clusters, m_blocks}, threads, fused_shared_bytes(c), run, c.clusters);
  Nmse e;
  for (int m = 0; m < rows; m++) {
    double squares = 0;
    for (int k = 0; k < c.k; k++) squares += value(x[m * c.k + k]) * value(x[m * c.k + k]);
    const double factor = c.norm ? 1 / std::sqrt(squares / c.k + eps) : 1;
    std::vector<double> dots(weight_rows);
    for (int row = 0; row < weight_rows; row++) {
      for (int k = 0; k < c.k; k++)
        dots[row] += value(w[size_t(row) * c.k + k]) * value(x[m * c.k + k]) * (c.norm ? value(norm[k]) : 1);
      dots[row] = dots[row] * factor + (c.extras && c.after != GATED ? value(bias[row]) : 0);
    }
    for (int n = 0; n < c.n; n++) {
      const auto got = [&](int i) { return out_f32 ? y32[m * c.n + i] : value(y[m * c.n + i]); };
      if (c.after == PLAIN) e.add(got(n), dots[n] + (c.extras ? value(add[m * c.n + n]) : 0));
      if (c.after == GATED) e.add(got(n), dots[n] / (1 + std::exp(-dots[n])) * dots[n + c.n]);
      if (c.after != ROTATED) continue;
      const int head = n / head_dim, i = n % head_dim, j = i % half;
      const double a = dots[head * head_dim + j], b = dots[head * head_dim + j + half];
      const double cs = head < 4 ? cosine[positions[m] * half + j] : 1, sn = head < 4 ? sine[positions[m] * half + j] : 0;
      const double want = i < half ? a * cs - b * sn : b * cs + a * sn;
      if (head < heads) e.add(got(n), want);
      else if (slots[m] >= 0) e.add(value((head == 3 ? keys : values)[slots[m] * head_dim + i]), want);
      if (head >= heads && y[m * c.n + n] != 0xffff) expect(false, "K and V stay out of y");
    }
  }
  // Two roundings to bf16 one behind the other where a separate kernel would read the first.
  const double bound = c.after == GATED ? 4e-5 : BF16_BOUND;
  e.below(out_f32 ? (c.norm && c.most_rows > 1 ? BF16_BOUND : 1e-9) : bound, std::string(c.name) + " rows " + std::to_string(rows));
  // A slot of -1 and those that no row has stay as they were.
  for (int s = 0; s < slots_in_cache && c.after == ROTATED; s++) {
    bool used = false;
    for (int m = 0; m < rows; m++) used |= slots[m] == s;
    for (int i = 0; i < head_dim && !used; i++)
      if (keys[s * head_dim + i] != 0xffff || values[s * head_dim + i] != 0xffff) return expect(false, "a slot of nobody is written");
  }
}

inline void test_fused_linear() {
  using namespace fused;
#define CASE(NAME, ...) {NAME, #NAME, __VA_ARGS__}
  const FusedCase cases[] = {
      CASE(fused_gemv_plain, PLAIN, 2, 4, 1, 21, 1032, 1, true, true),
      CASE(fused_gemv_plain, PLAIN, 2, 4, 1, 22, 4168, 1, false, false),
      CASE(fused_gemv_gated, GATED, 1, 4, 1, 21, 520, 1, true, false),
      CASE(fused_gemv_rotated, ROTATED, 1, 4, 1, 80, 520, 1, true, true),
      CASE(fused_m8_plain_t1_w8, PLAIN, 16, 8, 8, 32, 2144, 4, false, true),
      CASE(fused_m8_plain_t1_w8, PLAIN, 16, 8, 8, 32, 160, 1, true, true),
      CASE(fused_m8_plain_t1_w16, PLAIN, 16, 16, 8, 32, 4864, 2, false, false),
      CASE(fused_m8_gated_t2_w8, GATED, 16, 8, 8, 48, 896, 1, true, false),
      CASE(fused_m8_rotated_t1_w16, ROTATED, 8, 16, 8, 320, 416, 1, false, true),
      CASE(fused_m16_plain_t1_w16, PLAIN, 16, 16, 16, 32, 1120, 1, true, true),
      CASE(fused_m16_gated_t2_w8, GATED, 16, 8, 16, 32, 896, 1, true, false),
      CASE(fused_m16_rotated_t1_w8, ROTATED, 8, 8, 16, 80, 896, 1, true, true),
      CASE(tile_m32_plain_c8, PLAIN, 64, 8, 32, 128, 1088, 8, false, false, 64),
      CASE(tile_m32_plain_c8, PLAIN, 64, 8, 32, 128, 640, 8, true, true, 64),
      CASE(tile_m32_gated_c2, GATED, 32, 8, 32, 64, 320, 2, false, false, 64),
      CASE(tile_m32_gated_c2, GATED, 32, 8, 32, 64, 896, 2, true, false, 64),
      CASE(tile_m32_rotated_c8, ROTATED, 32, 8, 32, 320, 1088, 8, false, true, 64),
      CASE(tile_m32_rotated_c8, ROTATED, 32, 8, 32, 320, 640, 8, true, true, 64),
      CASE(tile_m64_plain_c8, PLAIN, 64, 8, 64, 128, 1088, 8, false, false, 64),
      CASE(tile_m64_plain_c8, PLAIN, 64, 8, 64, 128, 640, 8, true, true, 64),
      CASE(tile_m64_rotated_c8, ROTATED, 32, 8, 64, 320, 1088, 8, false, true, 64),
      CASE(tile_m64_rotated_c8, ROTATED, 32, 8, 64, 320, 640, 8, true, true, 64),
  };
#undef CASE
  for (const auto& c : cases) {
    test_fused_case(c, c.most_rows);
    if (c.tile) test_fused_case(c, c.most_rows + integer_between(1, c.most_rows));
    if (c.most_rows > 1) test_fused_case(c, 1), test_fused_case(c, integer_between(2, c.most_rows - 1));
  }
}
