// Kernels that work row by row: embedding, norms, rotation and KV write, gated activations, gathers.
#pragma once
#include "check.hpp"
namespace rows {
#include "embed.cu"
#include "gated_act.cu"
#include "gather.cu"
#include "rms_norm.cu"
}  // namespace rows
namespace rope16 {
#define HEAD_DIM 16
#include "qk_norm_rope_kv_write.cu"
#undef HEAD_DIM
}  // namespace rope16
namespace rope64 {
#define HEAD_DIM 64
#include "qk_norm_rope_kv_write.cu"
#undef HEAD_DIM
}  // namespace rope64
namespace rope80 {
#define HEAD_DIM 80
#include "qk_norm_rope_kv_write.cu"
#undef HEAD_DIM
}  // namespace rope80
namespace rope96 {
#define HEAD_DIM 96
#include "qk_norm_rope_kv_write.cu"
#undef HEAD_DIM
}  // namespace rope96
namespace rope128 {
#define HEAD_DIM 128
#include "qk_norm_rope_kv_write.cu"
#undef HEAD_DIM
}  // namespace rope128

inline void test_embed() {
  const int width = 136, vocab = 50, tokens = 6;
  Buffer<bf16> table(vocab * width), out(tokens * width);
  fill(table);
  Buffer<int> ids(tokens), sampled(2);
  const int wanted[tokens] = {0, 49, 7, 31, 50, 12};  // 50 is outside
  for (int t = 0; t < tokens; t++) ids[t] = wanted[t];
  sampled[0] = 3, sampled[1] = 31;
  ids[3] = -1 - 1;
  emu::launch({tokens}, 64, 0, [&] { rows::embed(ids.data(), sampled.data(), table.data(), out.data(), width, vocab, 2.f); });
  for (int t = 0; t < tokens; t++)
    for (int i = 0; i < width; i++) {
      const double want = wanted[t] < vocab ? value(table[wanted[t] * width + i]) * 2 : 0;
      if (value(out[t * width + i]) != want) return expect(false, "embed");
    }
}

// `by_warp`: a warp a row.
inline void test_norm(int width, bool by_warp) {
  const int n = 5, threads = by_warp ? 64 : std::min(1024, (std::max(width / 8, 32) + 31) / 32 * 32);
  Buffer<bf16> x(n * width), w(width), add(n * width), residual(n * width), before(n * width), y(n * width);
  for (int form = 0; form < 3; form++) {
    fill(x, 3), fill(w), fill(add), fill(residual);
    std::memcpy(before.data(), residual.data(), n * width * 2);
    const float eps = 1e-5f, offset = form == 1 ? 1.f : 0.f;
    emu::launch({by_warp ? (n + 1) / 2 : n}, threads, 0, [&] {
      if (form == 0) rows::rms_norm(x.data(), w.data(), y.data(), n, width, eps, offset);
      if (form == 1) rows::rms_norm_add(x.data(), w.data(), add.data(), y.data(), n, width, eps, offset);
      if (form == 2) rows::add_rms_norm(x.data(), residual.data(), w.data(), y.data(), n, width, eps, offset);
    });
    Nmse e;
    for (int r = 0; r < n; r++) {
      double sum = 0;
      const auto in = [&](int i) { return form == 2 ? value(residual[r * width + i]) : value(x[r * width + i]); };
      for (int i = 0; i < width; i++) sum += in(i) * in(i);
      for (int i = 0; i < width; i++) {
        const double norm = in(i) / std::sqrt(sum / width + eps) * (value(w[i]) + offset);
        e.add(value(y[r * width + i]), norm + (form == 1 ? value(add[r * width + i]) : 0));
        if (form == 2)
          expect(residual[r * width + i] == bf16_bits(float(value(before[r * width + i]) + value(x[r * width + i]))), "residual");
      }
    }
    e.below(BF16_BOUND, "rms norm, form " + std::to_string(form) + " width " + std::to_string(width));
  }
}

inline void test_norms() {
  for (const int width : {8, 896, 1000, 4096, -896, -1024}) test_norm(std::abs(width), width < 0);
}

template <class F> void test_rope(F kernel, int hd, int rotary, bool norm, bool cached, bool by_token = false) {
  const int tokens = 5, heads = 3, kv = 2, all = heads + 2 * kv, blocks = 4;
  Buffer<bf16> qkv(tokens * all * hd), before(tokens * all * hd), qw(hd), kw(hd), kc(blocks * kv * 16 * hd), vc(blocks * kv * 16 * hd);
  fill(qkv), fill(qw), fill(kw);
  std::memcpy(before.data(), qkv.data(), qkv.size() * 2);
  Buffer<int> positions(tokens), slots(tokens);
  Buffer<float> cosine(100 * rotary / 2), sine(100 * rotary / 2);
  for (size_t i = 0; i < cosine.size(); i++) cosine[i] = float(uniform_between(-1, 1)), sine[i] = float(uniform_between(-1, 1));
  for (int t = 0; t < tokens; t++) positions[t] = integer_between(0, 99), slots[t] = t * 13 % (blocks * 16);
  slots[2] = -1;
  const float eps = 1e-6f;
  emu::launch({by_token ? (tokens + 3) / 4 : (tokens * all + 15) / 16}, 128, 0, [&] {
    kernel(qkv.data(), positions.data(), slots.data(), cosine.data(), sine.data(), norm ? qw.data() : nullptr,
           norm ? kw.data() : nullptr, cached ? kc.data() : nullptr, cached ? vc.data() : nullptr, tokens, heads, kv, rotary, eps, 0.f);
  });
  Nmse e;
  size_t written = 0;
  for (int t = 0; t < tokens; t++)
    for (int h = 0; h < all; h++) {
      const bf16* x = &before[(t * all + h) * hd];
      const bool is_value = h >= heads + kv, is_query = h < heads;
      const bf16* got = &qkv[(t * all + h) * hd];
      if (!is_query && cached) {
        expect(is_value || !std::memcmp(got, x, hd * 2), "cached K leaves the row alone");
        if (slots[t] < 0) continue;
        const int at = slots[t], kh = is_value ? h - heads - kv : h - heads;
        got = (is_value ? vc : kc).data() + ((at / 16 * kv + kh) * 16 + at % 16) * hd;
        written += hd;
      }
      double sum = 0;
      for (int i = 0; i < hd; i++) sum += value(x[i]) * value(x[i]);
      const auto in = [&](int i) {
        return value(x[i]) * (norm && !is_value ? value((is_query ? qw : kw)[i]) / std::sqrt(sum / hd + eps) : 1);
      };
      for (int i = 0; i < hd; i++) {
        double want = in(i);
        const int half = rotary / 2, angle = positions[t] * half + i % half;
        if (!is_value && i < half) want = in(i) * cosine[angle] - in(i + half) * sine[angle];
        else if (!is_value && i < rotary) want = in(i) * cosine[angle] + in(i - half) * sine[angle];
        e.add(value(got[i]), want);
      }
    }
  e.below(BF16_BOUND, "rope " + std::to_string(hd) + " rotary " + std::to_string(rotary));
  size_t found = 0;
  for (size_t i = 0; i < kc.size(); i++) found += (kc[i] != 0xffff) + (vc[i] != 0xffff);
  expect(found == written, "only the slots of real tokens are written");
}

inline void test_rows() {
  test_embed();
  test_norms();
  for (const bool norm : {false, true})
    for (const bool cached : {true, false}) {
      test_rope(rope16::qk_norm_rope_kv_write, 16, 16, norm, cached);
      test_rope(rope64::qk_norm_rope_kv_write, 64, 64, norm, cached);
      test_rope(rope80::qk_norm_rope_kv_write, 80, 32, norm, cached);
      test_rope(rope96::qk_norm_rope_kv_write, 96, 96, norm, cached);
      test_rope(rope128::qk_norm_rope_kv_write, 128, 64, norm, cached);
      test_rope(rope128::qk_norm_rope_kv_write, 128, 128, norm, cached);
      test_rope(rope16::qk_norm_rope_kv_write, 16, 16, norm, cached, true);
      test_rope(rope64::qk_norm_rope_kv_write, 64, 64, norm, cached, true);
      test_rope(rope96::qk_norm_rope_kv_write, 96, 96, norm, cached, true);
      test_rope(rope128::qk_norm_rope_kv_write, 128, 64, norm, cached, true);
      test_rope(rope128::qk_norm_rope_kv_write, 128, 128, norm, cached, true);
    }
  const int width = 328, n = 3;
  Buffer<bf16> gu(n * 2 * width), out(n * width);
  fill(gu, 6);
  for (int act = 0; act < 3; act++) {
    emu::launch({(width / 8 + 31) / 32, n}, 32, 0, [&] {
      if (act == 0) rows::silu_mul(gu.data(), out.data(), width);
      if (act == 1) rows::gelu_mul(gu.data(), out.data(), width);
      if (act == 2) rows::gelu_tanh_mul(gu.data(), out.data(), width);
    });
    Nmse e;
    for (int r = 0; r < n; r++)
      for (int i = 0; i < width; i++) {
        const double x = value(gu[r * 2 * width + i]), up = value(gu[r * 2 * width + width + i]);
        const double gate = act == 0   ? x / (1 + std::exp(-x))
                            : act == 1 ? 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)))
                                       : 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
        e.add(value(out[r * width + i]), gate * up);
      }
    e.below(BF16_BOUND, "gated activation " + std::to_string(act));
  }
  Buffer<int> picked(3), start(4);
  picked[0] = 2, picked[1] = -1, picked[2] = 0, start[0] = 0, start[1] = 2, start[2] = 2, start[3] = 3;
  for (const bool last : {false, true}) {
    emu::launch({3}, 32, 0, [&] {
      if (last) rows::gather_last_rows(gu.data(), start.data(), out.data(), width);
      else rows::gather_rows(gu.data(), picked.data(), out.data(), width);
    });
    const int want[2][3] = {{2, -1, 0}, {1, -1, 2}};
    for (int r = 0; r < 3; r++)
      for (int i = 0; i < width; i++)
        if (out[r * width + i] != (want[last][r] < 0 ? 0 : gu[want[last][r] * width + i])) return expect(false, "gather");
  }
}
