// The products between two attentions in one launch, by one cluster: it then takes all tiles in several rounds.
#pragma once
#include "check.hpp"
#include "wgmma_emulated.hpp"
#include "wide_linear_test.hpp"
namespace chain {
#include "linear.cuh"
#include "chain_linear.cu"
}

struct ChainCase { int rows, hidden, attention, inner, heads, kv_heads, head_dim; bool bias, next; };

struct ChainModel {
  Buffer<bf16> o, gate_up, down, qkv, mlp_norm, next_norm, bias;
  explicit ChainModel(const ChainCase& c)
      : o(size_t(c.hidden) * c.attention), gate_up(size_t(2) * c.inner * c.hidden), down(size_t(c.hidden) * c.inner),
        qkv(size_t(c.heads + 2 * c.kv_heads) * c.head_dim * c.hidden), mlp_norm(c.hidden), next_norm(c.hidden),
        bias((c.heads + 2 * c.kv_heads) * c.head_dim) {
    fill(o, 0.3), fill(gate_up, 0.3), fill(down, 0.3), fill(qkv, 0.3), fill(mlp_norm), fill(next_norm), fill(bias);
  }
};

inline double chain_rounded(double v) { return bf16_value(bf16_bits(float(v))); }
// Rows [rows, k] times weights [n, k], both as they are.
inline std::vector<double> chain_product(const std::vector<double>& x, const Buffer<bf16>& w, int rows, int k) {
  const int n = int(w.size()) / k;
  std::vector<double> y(size_t(rows) * n);
  for (int m = 0; m < rows; m++)
    for (int i = 0; i < n; i++)
      for (int j = 0; j < k; j++) y[m * n + i] += x[m * k + j] * value(w[size_t(i) * k + j]);
  return y;
}
inline std::vector<double> chain_normed(const std::vector<double>& h, const Buffer<bf16>& norm, int rows, double eps) {
  const int n = int(norm.size());
  std::vector<double> y(h.size());
  for (int m = 0; m < rows; m++) {
    double sum = 0;
    for (int i = 0; i < n; i++) sum += h[m * n + i] * h[m * n + i];
    for (int i = 0; i < n; i++) y[m * n + i] = h[m * n + i] / std::sqrt(sum / n + eps) * value(norm[i]);
  }
  return y;
}

// Two launches behind one another: the count goes on.
inline void test_chain_case(const ChainCase& c) {
  constexpr int SLOTS = 160, POSITIONS = 20, ROOM = 64;
  const ChainModel w(c);
  const int half = c.head_dim / 2, qkv = (c.heads + 2 * c.kv_heads) * c.head_dim;
  Buffer<bf16> x(size_t(c.rows) * c.attention), h(size_t(c.rows) * c.hidden), normed(size_t(ROOM) * c.hidden);
  Buffer<bf16> inner(size_t(c.rows) * c.inner), out(size_t(c.rows) * qkv);
  Buffer<bf16> keys(size_t(SLOTS) * c.kv_heads * c.head_dim), values(keys.size());
  Buffer<float> squares(size_t(ROOM) * c.hidden / 16), cosine(POSITIONS * half), sine(POSITIONS * half);
  Buffer<u64> count(1);
  Buffer<int> positions(c.rows), slots(c.rows);
  count[0] = 0;
  for (size_t i = 0; i < cosine.size(); i++) cosine[i] = uniform_between(-1, 1), sine[i] = uniform_between(-1, 1);
  for (int m = 0; m < c.rows; m++) positions[m] = integer_between(0, POSITIONS - 1), slots[m] = m == 1 ? -1 : (m * 2 + 5) % SLOTS;
  const TensorMap maps[] = {{x.data(), c.attention, c.rows, 64}, {w.o.data(), c.attention, c.hidden, 64},
                            {normed.data(), c.hidden, c.rows, 64}, {w.gate_up.data(), c.hidden, 2 * c.inner, 48},
                            {inner.data(), c.inner, c.rows, 64}, {w.down.data(), c.inner, c.hidden, 64},
                            {w.qkv.data(), c.hidden, qkv, 32}};
  for (int launch = 0; launch < 2; launch++) {
    fill(x), fill(h);
    std::vector<double> in(x.size()), residual(h.size());
    for (size_t i = 0; i < in.size(); i++) in[i] = value(x[i]);
    for (size_t i = 0; i < residual.size(); i++) residual[i] = value(h[i]);
    emu::launch({1, 8, 1}, 256, 231296, [&] {
      chain::chain_linear(maps[0], maps[1], maps[2], maps[3], maps[4], maps[5], maps[6], h.data(), h.data(), normed.data(), squares.data(),
                          inner.data(), count.data(), w.mlp_norm.data(), w.next_norm.data(), c.bias ? w.bias.data() : nullptr,
                          out.data(), positions.data(), slots.data(), cosine.data(), sine.data(), keys.data(), values.data(),
                          c.rows, c.hidden, c.attention, c.inner, c.next ? qkv : 0, c.heads, c.kv_heads, c.head_dim, 1e-3f, 1e-2f);
    }, 8);
    auto now = chain_product(in, w.o, c.rows, c.attention);
    for (size_t i = 0; i < now.size(); i++) now[i] = chain_rounded(now[i] + residual[i]);
    const auto both = chain_product(chain_normed(now, w.mlp_norm, c.rows, 1e-3f), w.gate_up, c.rows, c.hidden);
    std::vector<double> gated(size_t(c.rows) * c.inner);
    Nmse of_inner, of_h, of_next;
    for (int m = 0; m < c.rows; m++)
      for (int i = 0; i < c.inner; i++) {
        gated[m * c.inner + i] = silu_of(both[m * 2 * c.inner + i]) * both[m * 2 * c.inner + c.inner + i];
        of_inner.add(value(inner[m * c.inner + i]), gated[m * c.inner + i]);
      }
    const auto more = chain_product(gated, w.down, c.rows, c.inner);
    for (size_t i = 0; i < now.size(); i++) now[i] += more[i], of_h.add(value(h[i]), now[i]);
    const std::string what = "chain_linear rows " + std::to_string(c.rows) + " launch " + std::to_string(launch);
    of_inner.below(2 * BF16_BOUND, what + " inner"), of_h.below(2 * BF16_BOUND, what + " h");
    expect(count[0] == u64(8 * 3) * (launch + 1), what + " count");
    if (!c.next) continue;
    const auto packed = chain_product(chain_normed(now, w.next_norm, c.rows, 1e-2f), w.qkv, c.rows, c.hidden);
    for (int m = 0; m < c.rows; m++)
      for (int head = 0; head < c.heads + 2 * c.kv_heads; head++)
        for (int i = 0; i < half; i++) {
          const auto dot = [&](int at) { return packed[m * qkv + at] + (c.bias ? value(w.bias[at]) : 0); };
          const double a = dot(head * c.head_dim + i), b = dot(head * c.head_dim + i + half);
          const bool turned = head < c.heads + c.kv_heads;
          const double cos = turned ? cosine[positions[m] * half + i] : 1, sin = turned ? sine[positions[m] * half + i] : 0;
          const bf16* to = &out[size_t(m) * qkv + head * c.head_dim];
          if (head >= c.heads) {
            if (slots[m] < 0) continue;
            const int kv_head = (head - c.heads) % c.kv_heads, slot = slots[m];
            to = &(turned ? keys : values)[((slot / 16 * c.kv_heads + kv_head) * 16 + slot % 16) * c.head_dim];
          }
          of_next.add(value(to[i]), a * cos - b * sin), of_next.add(value(to[i + half]), b * cos + a * sin);
        }
    of_next.below(5 * BF16_BOUND, what + " next");
  }
}

inline void test_chain_linear() {
  // rows, hidden, attention, inner, heads, kv_heads, head_dim
  test_chain_case({64, 128, 192, 200, 2, 1, 64, true, true});
  test_chain_case({33, 192, 1160, 104, 2, 1, 64, false, true});
  test_chain_case({5, 64, 64, 1096, 1, 1, 128, true, true});
  test_chain_case({40, 192, 72, 48, 1, 1, 64, false, false});
}
