// Paged attention, decode and prefill, against the plain sum.
#pragma once
#include "check.hpp"
#include "wgmma_emulated.hpp"
#define HEAD_DIM 64
namespace wg64 {
#include "attn_prefill_wgmma.cu"
}  // namespace wg64
#undef HEAD_DIM
#define HEAD_DIM 128
namespace wg128 {
#include "attn_prefill_wgmma.cu"
}  // namespace wg128
#undef HEAD_DIM
#define STAGES 2
#define KEY_TILE 32
#define HEAD_DIM 16
namespace at16 {
#include "attn_decode.cu"
#include "attn_prefill.cu"
}  // namespace at16
#undef HEAD_DIM
#define HEAD_DIM 32
namespace at32 {
#include "attn_decode.cu"
#include "attn_prefill.cu"
}  // namespace at32
#undef HEAD_DIM
#undef KEY_TILE
#undef STAGES
#define STAGES 3
#define HEAD_DIM 64
#define KEY_TILE 64
namespace at64 {
#include "attn_decode.cu"
#include "attn_prefill.cu"
}  // namespace at64
#undef HEAD_DIM
#undef KEY_TILE
#define HEAD_DIM 80
#define KEY_TILE 32
namespace at80 {
#include "attn_decode.cu"
#include "attn_prefill.cu"
}  // namespace at80
#undef HEAD_DIM
#define HEAD_DIM 96
namespace at96 {
#include "attn_decode.cu"
#include "attn_prefill.cu"
}  // namespace at96
#undef HEAD_DIM
#undef KEY_TILE
#define HEAD_DIM 128
#define KEY_TILE 64
namespace at128 {
#include "attn_decode.cu"
#include "attn_prefill.cu"
}  // namespace at128
#undef HEAD_DIM
#undef KEY_TILE
#undef STAGES

struct Seen { int window; float softcap; };  // which keys, and the cap of their scores

// A cache whose blocks lie scattered, with NaN wherever no token was written.
struct Cache {
  int hd, kv, max_blocks;
  Buffer<bf16> keys, values;
  Buffer<int> table;
  Cache(int hd, int kv, const std::vector<int>& lengths)
      : hd(hd), kv(kv), max_blocks(*std::max_element(lengths.begin(), lengths.end()) / 16 + 2),
        keys(lengths.size() * max_blocks * kv * 16 * hd), values(keys.size()), table(lengths.size() * max_blocks) {
    std::vector<int> all(table.size());
    for (size_t i = 0; i < all.size(); i++) all[i] = int(i);
    std::shuffle(all.begin(), all.end(), rng);
    for (size_t i = 0; i < all.size(); i++) table[i] = all[i];
    for (size_t s = 0; s < lengths.size(); s++)
      for (int t = 0; t < lengths[s]; t++)
        for (int h = 0; h < kv; h++)
          for (int d = 0; d < hd; d++) {
            keys[at(s, t, h) + d] = bf16(bf16_bits(float(uniform_between(-1, 1))));
            values[at(s, t, h) + d] = bf16(bf16_bits(float(uniform_between(-1, 1))));
          }
  }
  size_t at(size_t s, int t, int h) const { return (size_t(table[s * max_blocks + t / 16] * kv + h) * 16 + t % 16) * hd; }
  // Attention of one query at `position`.
  std::vector<double> attend(size_t s, int position, int h, const bf16* q, double scale, Seen mask) const {
    std::vector<double> p, out(hd, 0);
    double most = -1e300, sum = 0;
    const int first = mask.window > 0 ? std::max(0, position - mask.window + 1) : 0;
    for (int t = first; t <= position; t++) {
      double dot = 0;
      for (int d = 0; d < hd; d++) dot += value(q[d]) * value(keys[at(s, t, h) + d]);
      dot *= scale;
      if (mask.softcap > 0) dot = mask.softcap * std::tanh(dot / mask.softcap);
      p.push_back(dot), most = std::max(most, dot);
    }
    for (double& x : p) x = std::exp(x - most), sum += x;
    for (int t = first; t <= position; t++)
      for (int d = 0; d < hd; d++) out[d] += p[t - first] / sum * value(values[at(s, t, h) + d]);
    return out;
  }
};

// Decode of a few sequences: lengths, cache, query and what the launch must give.
struct Decode {
  int hd, kv, group, heads = kv * group, stride = (heads + 2 * kv) * hd;
  Seen mask;
  std::vector<int> lengths;
  int n = int(lengths.size());
  Cache cache;
  Buffer<bf16> q, out;
  Buffer<int> context;
  float scale = 1 / std::sqrt(float(hd));
  Decode(int hd, int kv, int group, Seen mask, const std::vector<int>& lengths)
      : hd(hd), kv(kv), group(group), mask(mask), lengths(lengths), cache(hd, kv, lengths), q(n * stride), out(n * heads * hd), context(n) {
    fill(q, 2);
    for (int s = 0; s < n; s++) context[s] = lengths[s];
  }
  template <class F> void call(F kernel, float* partial, float2* statistic) {
    kernel(q.data(), stride, cache.keys.data(), cache.values.data(), cache.table.data(), context.data(), out.data(), partial,
           statistic, cache.max_blocks, heads, kv, scale, mask.softcap, mask.window);
  }
  void check(const std::string& how) {
    Nmse e;
    for (int s = 0; s < n; s++)
      for (int h = 0; h < heads; h++) {
        const auto want = lengths[s] ? cache.attend(s, lengths[s] - 1, h / group, &q[s * stride + h * hd], scale, mask)
                                     : std::vector<double>(hd, 0);
        for (int d = 0; d < hd; d++) e.add(value(out[(s * heads + h) * hd + d]), want[d]);
      }
    e.below(BF16_BOUND, "decode head_dim " + std::to_string(hd) + " group " + std::to_string(group) + how);
  }
};

// `blocks` of a cluster, and how many clusters. Twice: the second launch finds what the first left.
template <class D> void test_decode(D decode, Decode&& d, int warps, size_t shared, int blocks, int clusters) {
  Buffer<float> partial(d.n * d.heads * clusters * d.hd);
  Buffer<float2> statistic(d.n * d.heads * clusters);
  for (int turn = 0; turn < 2; turn++) {
    std::memset(d.out.data(), 0xff, d.out.size() * 2);
    emu::launch({clusters * d.kv * ((d.group + 7) / 8), blocks, d.n}, warps * 32, shared, [&] { d.call(decode, partial.data(), statistic.data()); }, blocks);
    d.check(" of " + std::to_string(warps) + " warps, " + std::to_string(clusters) + " clusters of " + std::to_string(blocks));
  }
}
// The entry of so many warps in a head dimension's namespace.
#define TEST_DECODE(AT, WARPS, BLOCKS, CLUSTERS, ...) \
  test_decode(AT::attn_decode_w##WARPS, __VA_ARGS__, WARPS, AT::Ring<WARPS>::BYTES, BLOCKS, CLUSTERS)

// What a kernel takes for the caches: them or their maps.
template <class F> struct Second;
template <class Q, class K, class... Rest> struct Second<void (*)(Q, int, K, K, Rest...)> { using type = K; };
template <class F> auto caches(const Cache& cache, const TensorMap& key_map, const TensorMap& value_map) {
  using K = typename Second<F>::type;
  if constexpr (std::is_same_v<K, const TensorMap*>) return std::pair<K, K>(&key_map, &value_map);
  else return std::pair<K, K>(cache.keys.data(), cache.values.data());
}

// Chunks of several sequences behind `decodes` decode rows, which must stay as they are.
// `blocks`: of a grid that takes item after item; 0: one for each.
template <class F>
void test_prefill(F kernel, int hd, int key_tile, std::vector<int> chunks, std::vector<int> before, Seen mask, int blocks = 0) {
  const int decodes = 2, kv = 1, heads = 2, stride = (heads + 2 * kv) * hd;
  std::vector<int> lengths(decodes, 1);
  int rows = decodes, tiles = 1;  // one tile too many: padding
  for (size_t i = 0; i < chunks.size(); i++) lengths.push_back(chunks[i] + before[i]), rows += chunks[i], tiles += (chunks[i] + 127) / 128;
  const int n = int(lengths.size());
  Cache cache(hd, kv, lengths);
  Buffer<bf16> q(rows * stride), out(rows * heads * hd);
  fill(q, 2);
  Buffer<int> start(n + 1), context(n);
  for (int s = 0, at = 0; s < n; s++) start[s] = at, context[s] = lengths[s], at += s < decodes ? 1 : chunks[s - decodes];
  start[n] = rows;
  const float scale = 1 / std::sqrt(float(hd));
  const TensorMap key_map = {cache.keys.data(), hd}, value_map = {cache.values.data(), hd};
  const auto [keys, values] = caches<F>(cache, key_map, value_map);
  const dim3 grid = blocks ? dim3{blocks} : dim3{heads, tiles};
  emu::launch(grid, blocks ? 384 : 128, size_t(128 + 4 * key_tile) * (hd + 8) * 2, [&] {
    kernel(q.data(), stride, keys, values, start.data(), context.data(), cache.table.data(), out.data(),
           cache.max_blocks, decodes, n, kv, scale, mask.softcap, mask.window, heads, tiles);
  });
  Nmse e;
  for (int s = decodes; s < n; s++)
    for (int r = start[s]; r < start[s + 1]; r++)
      for (int h = 0; h < heads; h++) {
        const auto want = cache.attend(s, context[s] - (start[s + 1] - r), 0, &q[r * stride + h * hd], scale, mask);
        for (int d = 0; d < hd; d++) e.add(value(out[(r * heads + h) * hd + d]), want[d]);
      }
  e.below(BF16_BOUND, "prefill head_dim " + std::to_string(hd) + " window " + std::to_string(mask.window));
  for (int i = 0; i < decodes * heads * hd; i++)
    if (out[i] != 0xffff) return expect(false, "prefill wrote a decode row");
}

inline void test_attention() {
  const std::vector<int> lengths = {integer_between(1, 15), 0, integer_between(16, 90), integer_between(300, 420)};
  TEST_DECODE(at16, 4, 1, 1, Decode{16, 2, 2, {0, 0}, lengths});
  TEST_DECODE(at16, 8, 8, 1, Decode{16, 2, 2, {0, 5}, lengths});
  TEST_DECODE(at32, 4, 2, 2, Decode{32, 2, 2, {0, 0}, lengths});
  TEST_DECODE(at32, 8, 1, 3, Decode{32, 1, 16, {70, 0}, lengths});
  TEST_DECODE(at64, 4, 1, 1, Decode{64, 2, 7, {0, 0}, lengths});
  TEST_DECODE(at64, 4, 4, 1, Decode{64, 1, 1, {40, 0}, lengths});
  TEST_DECODE(at64, 8, 8, 1, Decode{64, 2, 8, {0, 5}, lengths});
  TEST_DECODE(at64, 8, 2, 2, Decode{64, 1, 7, {0, 0}, {2100, 33, 0}});
  TEST_DECODE(at64, 4, 1, 12, Decode{64, 1, 16, {0, 0}, {2900, 16}});  // more splits than are read at a time
  TEST_DECODE(at80, 4, 1, 3, Decode{80, 2, 1, {0, 0}, lengths});
  TEST_DECODE(at80, 8, 4, 1, Decode{80, 1, 5, {50, 0}, lengths});
  TEST_DECODE(at96, 4, 1, 1, Decode{96, 1, 8, {70, 0}, lengths});
  TEST_DECODE(at96, 8, 8, 1, Decode{96, 1, 4, {0, 0}, lengths});
  TEST_DECODE(at128, 4, 1, 1, Decode{128, 2, 4, {0, 0}, lengths});
  TEST_DECODE(at128, 4, 2, 1, Decode{128, 1, 12, {33, 0}, lengths});
  TEST_DECODE(at128, 4, 1, 3, Decode{128, 1, 4, {0, 0}, {1500, 513, 512, 1}});
  TEST_DECODE(at128, 8, 4, 3, Decode{128, 1, 8, {700, 5}, {1300, 4200}});
  test_prefill(at16::attn_prefill, 16, 32, {50}, {3}, {0, 0});
  test_prefill(at32::attn_prefill, 32, 32, {133}, {40}, {30, 0});
  test_prefill(wg64::attn_prefill_wgmma, 64, 128, {130, 3}, {5, 170}, {0, 0}, 2);
  test_prefill(wg64::attn_prefill_wgmma, 64, 128, {300}, {0}, {0, 0}, 9);
  test_prefill(wg128::attn_prefill_wgmma, 128, 128, {1, 140}, {0, 300}, {0, 0}, 3);
  test_prefill(wg128::attn_prefill_wgmma, 128, 128, {150}, {160}, {65, 5}, 1);
  test_prefill(wg128::attn_prefill_wgmma, 128, 128, {400}, {33}, {0, 0}, 3);
  test_prefill(at64::attn_prefill, 64, 64, {130, 3}, {5, 70}, {0, 0});
  test_prefill(at80::attn_prefill, 80, 32, {40}, {31}, {0, 5});
  test_prefill(at96::attn_prefill, 96, 32, {129}, {0}, {20, 0});
  test_prefill(at128::attn_prefill, 128, 64, {1, 140}, {0, 100}, {0, 0});
  test_prefill(at128::attn_prefill, 128, 64, {150}, {60}, {65, 0});
}
