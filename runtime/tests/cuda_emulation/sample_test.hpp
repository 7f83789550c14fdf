// Sampling against a plain sort, and its distribution against the definition.
#pragma once
#include "check.hpp"
namespace sampling {
#include "logits.cuh"
#include "sample_scan.cu"
#include "sample.cu"
#undef STATE_COUNT
#include "token_state.cu"
}  // namespace sampling
using sampling::SampleRow;

struct Sampler {
  int vocab, stride, state_stride, top_max = 8;
  Buffer<float> logits;
  Buffer<u16> state;
  Buffer<int> prompt, output, listed;
  Buffer<float> bias;
  Buffer<int> ids{1}, ranks{1}, top_ids{8};
  Buffer<float> logprobs{1}, top_logprobs{8};
  explicit Sampler(int vocab)
      : vocab(vocab), stride((vocab + 3) / 4 * 4), state_stride(stride), logits(stride), state(stride), prompt(3), output(5),
        listed(2), bias(2) {
    for (int i = 0; i < vocab; i++) logits[i] = float(uniform_between(-4, 4) + uniform_between(-4, 4));
    for (int i = 0; i < 3; i++) prompt[i] = integer_between(0, vocab - 1);
    for (int i = 0; i < 5; i++) output[i] = integer_between(0, 2) ? prompt[0] : integer_between(0, vocab - 1);
    listed[0] = integer_between(0, vocab - 1), listed[1] = (listed[0] + 1) % vocab;
    bias[0] = 3.f, bias[1] = -INFINITY;
  }
  void reset() {
    emu::launch({1}, 1024, 0, [&] {
      sampling::token_state_reset(state.data(), vocab, state_stride, prompt.data(), 3, output.data(), 5, listed.data(), 2);
    });
  }
  int run(const SampleRow& p) {
    Buffer<SampleRow> row(1);
    row[0] = p;
    int parts = integer_between(0, 3) * 5;  // 0: without the scan
    const bool plain_only = integer_between(0, 2) == 0;  // as the head leaves them: for plain rows, who have no logits
    if (plain_only) parts = (vocab + 3) / 4;
    Buffer<u64> bests(parts + 1);
    const std::vector<float> kept(logits.data(), logits.data() + stride);
    if (plain_only && sampling::is_plain(p)) {
      for (int i = 0; i < parts; i++) {
        bests[i] = sampling::candidate(-INFINITY, i * 4);
        for (int id = i * 4; id < std::min(vocab, i * 4 + 4); id++) bests[i] = std::max(bests[i], sampling::candidate(float(tamed(logits[id])), id));
      }
      std::fill(logits.data(), logits.data() + stride, NAN);
    }
    if (parts > 0 && !plain_only)
      emu::launch({parts, 1}, 256, 0, [&] {
        sampling::sample_scan(logits.data(), row.data(), state.data(), listed.data(), bias.data(), bests.data(), vocab, stride,
                              state_stride);
      });
    emu::launch({1}, 1024, 0, [&] {
      sampling::sample(logits.data(), row.data(), state.data(), listed.data(), bias.data(), ids.data(), logprobs.data(),
                       ranks.data(), top_ids.data(), top_logprobs.data(), bests.data(), vocab, stride, state_stride, top_max, parts, plain_only);
    });
    std::copy(kept.begin(), kept.end(), logits.data());
    return ids[0];
  }
  static double tamed(double x) { return std::isnan(x) ? -INFINITY : std::min(x, 3.4028234663852886e38); }
  std::vector<double> adjusted(const SampleRow& p) const {
    std::vector<double> x(vocab);
    for (int i = 0; i < vocab; i++) x[i] = tamed(logits[i]);
    if (p.state_slot < 0) return x;
    for (int i = 0; i < vocab; i++) {
      const int count = int(std::count(output.data(), output.data() + 5, i));
      const bool seen = count || std::count(prompt.data(), prompt.data() + 3, i);
      if (seen) x[i] = x[i] > 0 ? x[i] / p.repetition_penalty : x[i] * p.repetition_penalty;
      if (count) x[i] -= p.frequency_penalty * count + p.presence_penalty;
    }
    for (int i = 0; i < p.bias_count; i++) x[listed[i]] += bias[i];
    return x;
  }
  // Probability of every token by the definition, ties by lower id.
  std::vector<double> distribution(const SampleRow& p) const {
    const auto x = adjusted(p);
    std::vector<int> by_rank(vocab);
    for (int i = 0; i < vocab; i++) by_rank[i] = i;
    std::stable_sort(by_rank.begin(), by_rank.end(), [&](int a, int b) { return x[a] > x[b]; });
    std::vector<double> w(vocab), kept(vocab, 0);
    for (int i = 0; i < vocab; i++) w[i] = std::exp((x[i] - x[by_rank[0]]) / p.temperature);
    size_t n = p.top_k > 0 ? std::min(p.top_k, vocab) : vocab;
    double total = 0, sum = 0;
    for (size_t i = 0; i < n; i++)
      if (i && w[by_rank[i]] < p.min_p) n = i;
      else total += w[by_rank[i]];
    for (size_t i = 0; i < n; i++) {
      kept[by_rank[i]] = w[by_rank[i]];
      sum += w[by_rank[i]];
      if (p.top_p < 1 && sum >= p.top_p * total) break;
    }
    for (double& k : kept) k /= p.top_p < 1 ? std::min(sum, total) : total;
    return kept;
  }
};

inline SampleRow plain_row() { return {1.f, 0, 1.f, 0.f, 1.f, 0.f, 0.f, -1, 1, 0, 0, 0, 0, 0, -1, 1}; }

// Chi-square-free check: over many seeds no token outside the kept set, and the empirical mean of log p within reach.
inline void test_distribution(Sampler& s, SampleRow p, int draws, const std::string& what) {
  const auto want = s.distribution(p);
  double expected = 0, spread = 0, got = 0;
  for (const double q : want)
    if (q > 0) expected += q * std::log(q), spread += q * std::log(q) * std::log(q);
  spread = std::sqrt(std::max(spread - expected * expected, 0.0) / draws);
  for (int i = 0; i < draws; i++) {
    p.seed_low = 1000 + i, p.step_low = i * 7;
    if (p.state_slot >= 0) s.reset();
    const int id = s.run(p);
    if (id < 0 || id >= s.vocab || !(want[id] > 0)) return expect(false, what + ": token outside the kept set");
    got += std::log(want[id]) / draws;
  }
  if (std::fabs(got - expected) > 4.5 * spread + 1e-6) std::printf("mean log p %f, expected %f +- %f\n", got, expected, spread);
  expect(std::fabs(got - expected) <= 4.5 * spread + 1e-6, what + ": distribution");
}

inline void test_sample() {
  for (const int vocab : {515, 6001}) {
    Sampler s(vocab);
    s.logits[vocab / 2] = NAN;
    SampleRow p = plain_row();
    p.temperature = 0;
    s.logits[vocab - 1] = 9.f, s.logits[vocab / 3] = 9.f;
    for (int i = 0; i < 4; i++) expect(s.run(p) == vocab / 3, "greedy takes the lower id of a tie");
    p.logprobs = 5, s.run(p);
    double sum = 0;
    const auto x = s.adjusted(p);
    for (const double v : x) sum += std::exp(v - 9);
    expect(std::fabs(s.logprobs[0] + std::log(sum)) < 1e-4 && s.ranks[0] == 1, "logprob and rank of the chosen");
    expect(s.top_ids[0] == vocab / 3 && s.top_ids[1] == vocab - 1, "top logprobs, ties by lower id");
    for (int i = 0; i < 5; i++)
      expect(std::fabs(s.top_logprobs[i] - (x[s.top_ids[i]] - 9 - std::log(sum))) < 1e-4, "top logprob value");
    expect(s.top_ids[5] == -1, "no more than asked for");
    s.logits[vocab - 1] = 1.f, s.logits[vocab / 3] = 1.f;

    SampleRow penal = plain_row();
    penal.state_slot = 0, penal.repetition_penalty = 1.7f, penal.presence_penalty = 0.5f, penal.frequency_penalty = 0.25f;
    penal.bias_count = 2, penal.temperature = 0;
    s.logits[s.prompt[0]] = 8.2f, s.logits[s.listed[1]] = 20.f;
    s.reset();
    const auto adjusted = s.adjusted(penal);
    expect(s.run(penal) == std::max_element(adjusted.begin(), adjusted.end()) - adjusted.begin(), "penalties and bias, greedy");
    const int count = int(std::count(s.output.data(), s.output.data() + 5, s.ids[0]));
    expect((s.state[s.ids[0]] & 0x3fff) == count + 1, "the chosen token is counted");
    s.logits[s.listed[1]] = 0.f;

    const int draws = vocab < 1000 ? 60 : 25;
    test_distribution(s, plain_row(), draws, "plain");
    p = plain_row(), p.top_k = 20, p.temperature = 0.8f;
    test_distribution(s, p, draws, "top_k");
    p.top_p = 0.7f, p.min_p = 0.05f;
    test_distribution(s, p, draws, "top_k top_p min_p");
    p = plain_row(), p.top_p = 0.5f;
    test_distribution(s, p, draws, "top_p");
    p.min_p = 0.1f, p.top_p = 1.f;
    test_distribution(s, p, draws, "min_p");
    penal.temperature = 1.3f, penal.top_p = 0.9f;
    test_distribution(s, penal, draws / 2, "penalties");
    p = plain_row(), p.temperature = 50.f, p.top_p = 0.9f;
    test_distribution(s, p, draws / 4, "a nucleus too wide to gather");
    p.top_k = 513;
    test_distribution(s, p, draws / 4, "top_k by bisection");
    p = plain_row(), p.top_k = 1, p.temperature = 2.f;
    test_distribution(s, p, 2, "top_k 1");
  }
  Sampler s(600);
  for (int i = 0; i < 600; i++) s.logits[i] = i % 2 ? NAN : -INFINITY;
  s.listed[0] = 1, s.listed[1] = 0, s.bias[0] = 0.f;
  SampleRow p = plain_row();
  p.bias_count = 2, p.state_slot = 0;
  s.reset();
  expect(s.run(p) == 1, "nothing possible: the lowest id that is not forbidden");
  SampleRow off = plain_row();
  off.active = 0, s.ids[0] = -7;
  expect(s.run(off) == -7, "padding rows write nothing");
}
