// What the choice of tokens sees of a row: its parameters, its logits and what is done to them before they are compared.
// Precedes sample.cu, sample_scan.cu and wide_head.cu.

#define GREEDY_TEMPERATURE 1e-5f
#define ROW_THREADS 1024  // of a block that reads a whole row
#define STATE_PROMPT 0x8000u
#define STATE_LISTED 0x4000u
#define STATE_COUNT 0x3fffu

struct SampleRow {
  float temperature;
  int top_k;  // 0: all
  float top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty;
  int state_slot;  // -1: none
  u32 seed_low, seed_high, step_low, step_high;
  int bias_begin, bias_count;
  int logprobs;  // -1: none
  int active;    // 0: a padding row
};

DEVICE float tame(float x) { return x != x ? minus_infinity() : fminf(x, 3.402823466e38f); }
// Bits that order like the numbers.
DEVICE u32 order_bits(float x) {
  const u32 u = __float_as_uint(x);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}
DEVICE float from_order_bits(u32 u) { return __uint_as_float(u & 0x80000000u ? u & 0x7fffffffu : ~u); }
// Larger is likelier, then lower id.
DEVICE u64 candidate(float x, int id) { return ((u64)order_bits(x) << 32) | (u32)~id; }
DEVICE float candidate_value(u64 c) { return from_order_bits((u32)(c >> 32)); }
DEVICE int candidate_id(u64 c) { return (int)~(u32)c; }

struct Logits {
  const float* row;
  const u16* state;  // null: nothing to adjust
  const int* bias_tokens;
  const float* bias_values;
  int vocab, bias_count;
  float repetition, presence, frequency;

  // Rare, and used in a hundred places: inlined there it makes the compiler take ten seconds.
  DEVICE_CALL float adjust(float x, int id) const {
    const u32 st = state[id];
    if (st == 0) return x;
    const u32 count = st & STATE_COUNT;
    if (repetition != 1.f && ((st & STATE_PROMPT) || count)) x = tame(x > 0.f ? x / repetition : x * repetition);
    if (count) x = tame(x - frequency * (float)count - presence);
    if (st & STATE_LISTED)
      for (int i = 0; i < bias_count; i++)
        if (bias_tokens[i] == id) x = tame(x + bias_values[i]);
    return x;
  }
  // f(id, raw, adjusted) for four neighbours at a time, over the whole block. Four loads are under way at once.
  template <class F> DEVICE void each(F f) const {
    int base = threadIdx.x * 4;
    for (; base + ROW_THREADS * 12 < vocab; base += ROW_THREADS * 16) {
      float4 v[4];
#pragma unroll
      for (int i = 0; i < 4; i++) v[i] = *(const float4*)(row + base + i * ROW_THREADS * 4);
#pragma unroll
      for (int i = 0; i < 4; i++) give4(v[i], base + i * ROW_THREADS * 4, f);
    }
    for (; base < vocab; base += ROW_THREADS * 4) each4(base, f);
  }
  template <class F> DEVICE void each4(int base, F& f) const { give4(*(const float4*)(row + base), base, f); }
  template <class F> DEVICE void give4(const float4& v, int base, F& f) const {
    const float four[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (base + i < vocab) {
        const float raw = tame(four[i]);
        f(base + i, raw, state != nullptr ? adjust(raw, base + i) : raw);
      }
  }
};

DEVICE bool is_greedy(const SampleRow& p) { return !(p.temperature >= GREEDY_TEMPERATURE); }
// Nothing is wanted of the row but the likeliest token of its logits as they are.
DEVICE bool is_plain(const SampleRow& p) { return is_greedy(p) && p.logprobs < 0 && p.state_slot < 0; }
DEVICE Logits logits_of(const SampleRow& p, const float* all_logits, const u16* state, const int* bias_tokens,
                        const float* bias_values, int row, int row_stride, int vocab) {
  return {all_logits + (u64)row * row_stride, state, bias_tokens + p.bias_begin, bias_values + p.bias_begin, vocab,
          p.bias_count, p.repetition_penalty, p.presence_penalty, p.frequency_penalty};
}
