// Products with few rows.
#pragma once
#include "check.hpp"
namespace product {
#include "gemv.cu"
}

typedef void (*Gemv)(const bf16*, const bf16*, const bf16*, const bf16*, void*, int, int, int, int);
struct GemvCase { Gemv kernel; int threads, rows_per_block, n, k, most_rows; const char* name; };

inline void test_gemv_case(const GemvCase& c, bool extras, int m) {
  Buffer<bf16> w(size_t(c.n) * c.k), x(m * c.k), bias(c.n), add(m * c.n), y(m * c.n);
  Buffer<float> y32(m * c.n);
  fill(w), fill(x), fill(bias), fill(add);
  for (const int out_f32 : {0, 1}) {
    emu::launch({(c.n + c.rows_per_block - 1) / c.rows_per_block}, c.threads, 0, [&] {
      c.kernel(w.data(), x.data(), extras ? bias.data() : nullptr, extras ? add.data() : nullptr,
               out_f32 ? (void*)y32.data() : y.data(), m, c.n, c.k, out_f32);
    });
    Nmse e;
    for (int r = 0; r < m; r++)
      for (int n = 0; n < c.n; n++) {
        const auto dot = [&](int row) {
          double sum = 0;
          for (int k = 0; k < c.k; k++) sum += value(w[size_t(row) * c.k + k]) * value(x[r * c.k + k]);
          return sum;
        };
        double want = dot(n);
        if (extras) want += value(bias[n]) + value(add[r * c.n + n]);
        e.add(out_f32 ? y32[r * c.n + n] : value(y[r * c.n + n]), want);
      }
    e.below(out_f32 ? 1e-10 : BF16_BOUND, c.name);
  }
}

inline void test_gemv() {
  using namespace product;
  const GemvCase cases[] = {
      {gemv_r1_u4_s1, 128, 4, 21, 1032, 1, "gemv_r1_u4_s1"},
      {gemv_r2_u4_s1, 128, 8, 21, 1032, 1, "gemv_r2_u4_s1"},
      {gemv_r4_u2_s1, 128, 16, 21, 520, 1, "gemv_r4_u2_s1"},
      {gemv_r1_u4_s4, 128, 1, 5, 4168, 1, "gemv_r1_u4_s4"},
      {gemv_r2_u4_s4, 128, 2, 5, 4168, 1, "gemv_r2_u4_s4"},
      {gemv_r1_u4_s2, 128, 2, 5, 2056, 1, "gemv_r1_u4_s2"},
      {skinny_t1_w4, 128, 16, 32, 896, 8, "skinny_t1_w4"},
      {skinny_t1_w8, 256, 16, 32, 96, 8, "skinny_t1_w8"},
      {skinny_t1_w16, 512, 16, 16, 2144, 8, "skinny_t1_w16"},
      {skinny_t2_w8, 256, 32, 64, 608, 8, "skinny_t2_w8"},
      {skinny_t2_w16, 512, 32, 32, 1120, 8, "skinny_t2_w16"},
  };
  for (const auto& c : cases) {
    test_gemv_case(c, false, 1);
    test_gemv_case(c, true, c.most_rows);
    if (c.most_rows > 1) test_gemv_case(c, false, integer_between(2, 7));
  }
}
