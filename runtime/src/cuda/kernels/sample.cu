// Choose the next token of each row from its logits, with every sampling parameter, in one launch and without a sort.
//
// logits [rows, row_stride] f32, row_stride a multiple of 4; they are not changed. rows: one SampleRow each. token_state
// [slots, state_stride] u16 (see token_state.cu), for rows whose choice depends on earlier tokens or a bias. bias_tokens,
// bias_values: the rows' bias lists end to end; -inf forbids. Outputs: token_ids [rows]; for rows that asked, logprobs
// [rows] and ranks [rows] of the chosen token, and top_ids, top_logprobs [rows, top_max], from the raw logits.
// The chosen token's count in token_state is raised. Grid: one block of 1,024 threads a row. vocab up to 2^24.
//
// bests [rows, parts]: the likeliest token of each part of greedy rows, of which only the best is left to choose (0 parts:
// this kernel looks at the logits itself). From sample_scan.cu, or plain_only: from wide_head.cu, for rows of which nothing
// else is wanted; they have no logits then.
//
// Order of operations and ties are those of engine::sampler: penalties, bias, temperature, min_p, top-k, top-p; equal
// logits go by lower id. With top-k up to 512, or a nucleus that lies within the likeliest 512, the kept tokens are
// gathered and sorted in shared memory. Otherwise the cut is found by bisection on the bits of the logits; there, tokens
// that tie at the cut are all kept.
// Expected: bytes, rows * vocab * 4 * passes (1 greedy, 2 sampled, 3 or 4 with logprobs); a single row is bound by one
// multiprocessor's arithmetic and share of L2: 10-20 us a pass at 128k. Greedy with a scan: 5 us for few rows.

#define THREADS ROW_THREADS
#define GATHER_MAX 2048     // gathered candidates
#define EXACT_MAX 512       // most tokens that gathering promises

struct SampleShared {
  u64 sorted[GATHER_MAX];
  float weights[GATHER_MAX];
  float scratch[32];
  u64 best[32];
  float segments[32];
  int gathered, chosen;
  u32 cut;
};

DEVICE u64 block_best(u64 c, SampleShared& s) {
#pragma unroll
  for (int o = 16; o; o >>= 1) {
    const u64 other = __shfl_xor_sync(FULL_WARP, c, o);
    c = other > c ? other : c;
  }
  if ((threadIdx.x & 31) == 0) s.best[threadIdx.x >> 5] = c;
  __syncthreads();
  c = s.best[threadIdx.x & 31];
#pragma unroll
  for (int o = 16; o; o >>= 1) {
    const u64 other = __shfl_xor_sync(FULL_WARP, c, o);
    c = other > c ? other : c;
  }
  __syncthreads();
  return c;
}

// Inclusive sums over the block in thread order; `total` gets the whole.
DEVICE float block_scan(float v, SampleShared& s, float& total) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
  for (int o = 1; o < 32; o <<= 1) {
    const float before = __shfl_up_sync(FULL_WARP, v, o);
    if (lane >= o) v += before;
  }
  if (lane == 31) s.scratch[warp] = v;
  __syncthreads();
  float w = s.scratch[lane];
#pragma unroll
  for (int o = 1; o < 32; o <<= 1) {
    const float before = __shfl_up_sync(FULL_WARP, w, o);
    if (lane >= o) w += before;
  }
  total = __shfl_sync(FULL_WARP, w, 31);
  const float offset = warp ? __shfl_sync(FULL_WARP, w, warp - 1) : 0.f;
  __syncthreads();
  return v + offset;
}

// Largest first, `n` a power of two up to GATHER_MAX.
DEVICE void sort_descending(u64* a, int n) {
  for (int size = 2; size <= n; size <<= 1)
    for (int stride = size >> 1; stride; stride >>= 1) {
      __syncthreads();
      for (int i = threadIdx.x; i < n >> 1; i += THREADS) {
        const int low = (i / stride) * stride * 2 + i % stride, high = low + stride;
        const bool down = (low & size) == 0;
        const u64 x = a[low], y = a[high];
        if ((x < y) == down) a[low] = y, a[high] = x;
      }
    }
  __syncthreads();
}

// Gathers into s.sorted, best first, at least the `count` (<= EXACT_MAX) likeliest of the adjusted (or raw) logits and
// whatever lies between; all of a prefix of the order. Returns how many, or -1 when too many tie or crowd.
// `best_of_thread` is the likeliest that this thread meets in Logits::each: the count-th best of those is a bound.
template <bool RAW>
DEVICE int gather_likeliest(const Logits& logits, u64 best_of_thread, int count, SampleShared& s) {
  s.sorted[threadIdx.x] = best_of_thread;
  sort_descending(s.sorted, THREADS);
  const u64 bound = s.sorted[count - 1];
  __syncthreads();
  if (threadIdx.x == 0) s.gathered = 0;
  __syncthreads();
  logits.each([&](int id, float raw, float adjusted) {
    const float x = RAW ? raw : adjusted;
    const u64 c = candidate(x, id);
    if (c >= bound && x > minus_infinity()) {
      const int at = atomicAdd(&s.gathered, 1);
      if (at < GATHER_MAX) s.sorted[at] = c;
    }
  });
  __syncthreads();
  const int found = s.gathered;
  if (found > GATHER_MAX) return -1;
  int n = 32;
  while (n < found) n <<= 1;
  for (int i = found + threadIdx.x; i < n; i += THREADS) s.sorted[i] = 0;
  sort_descending(s.sorted, n);
  return found;
}

struct Weigh {
  float max, temperature, least;  // least: from min_p
  DEVICE float of(float x) const {
    const float w = fmaxf(exp2_fast((x - max) / temperature * LOG2E), 0.f);  // NaN of -inf / inf: impossible
    return w >= least || w >= 1.f ? w : 0.f;
  }
};

// Two rounds of SplitMix64; the same number as engine::sampler's.
DEVICE u64 split_mix(u64 x) {
  u64 z = x + 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}
DEVICE float uniform(const SampleRow& p) {
  const u64 bits = split_mix(split_mix(((u64)p.seed_high << 32) | p.seed_low) ^ (((u64)p.step_high << 32) | p.step_low));
  return (float)(u32)(bits >> 40) * (1.f / 16777216.f);
}

// The token at share `u` of the first `kept` gathered weights; -1 when the nucleus is not complete in them.
// `total` < 0: the gathered tokens are all there are, their sum is the whole.
DEVICE int pick_gathered(const SampleRow& p, const Weigh& weigh, int kept, float total, float u, SampleShared& s) {
  float offset = 0.f, sum;
  for (int base = 0; base < kept; base += THREADS) {
    const int i = base + threadIdx.x;
    const float upto = block_scan(i < kept ? weigh.of(candidate_value(s.sorted[i])) : 0.f, s, sum) + offset;
    if (i < kept) s.weights[i] = upto;
    offset += sum;
  }
  __syncthreads();
  const bool complete = total < 0.f;
  if (complete) total = offset;
  int last = kept - 1;
  if (p.top_p < 1.f) {  // first whose running share reaches top_p
    const float target = fmaxf(p.top_p, 0.f) * total;
    if (!complete && offset < target) return -1;
    int low = 0, high = kept - 1;
    while (low < high) {
      const int mid = (low + high) >> 1;
      if (s.weights[mid] >= target) high = mid;
      else low = mid + 1;
    }
    last = low;
  }
  const float target = u * s.weights[last];
  int low = 0, high = last;
  while (low < high) {
    const int mid = (low + high) >> 1;
    if (s.weights[mid] > target) high = mid;
    else low = mid + 1;
  }
  return candidate_id(s.sorted[low]);
}

// Largest order_bits such that the tokens from there up weigh `target` (BY_COUNT: number that many).
template <bool BY_COUNT>
DEVICE u32 bisect_cut(const Logits& logits, const Weigh& weigh, float target, SampleShared& s) {
  u32 cut = 0;
  for (int bit = 31; bit >= 0; bit--) {
    const u32 tried = cut | (1u << bit);
    float sum = 0.f;
    logits.each([&](int, float, float x) {
      if (order_bits(x) >= tried) sum += BY_COUNT ? (x > minus_infinity() ? 1.f : 0.f) : weigh.of(x);
    });
    if (block_sum(sum, s.scratch) >= target) cut = tried;
  }
  return cut;
}

// The token at share `u` of all that weigh something from `cut` up, in order of id.
DEVICE int pick_by_id(const Logits& logits, const Weigh& weigh, u32 cut, float u, SampleShared& s) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int segment = ceil_div(ceil_div(logits.vocab, 32), 128) * 128;
  float sum = 0.f;
  const auto add = [&](int, float, float x) { if (order_bits(x) >= cut) sum += weigh.of(x); };
  for (int base = warp * segment + lane * 4; base < min(logits.vocab, (warp + 1) * segment); base += 128) logits.each4(base, add);
  sum = warp_sum(sum);
  if (lane == 0) s.segments[warp] = sum;
  if (threadIdx.x == 0) s.chosen = -1;
  __syncthreads();
  float total = 0.f, before = 0.f;
  for (int i = 0; i < 32; i++) total += s.segments[i];
  const float target = u * total;
  int at = -1;
  for (int i = 0; i < 32; i++) {
    if (s.segments[i] <= 0.f) continue;
    if (at >= 0 && before > target) break;
    at = i;
    before += s.segments[i];
  }
  if (at < 0) return -1;
  float upto = before - s.segments[at], whole;
  int fallback = -1;  // last that weighs anything: rounding may leave the target beyond the end
  for (int base = at * segment; base < min(logits.vocab, (at + 1) * segment); base += THREADS * 4) {
    float four[4] = {0.f, 0.f, 0.f, 0.f};
    const int mine = base + threadIdx.x * 4;
    if (mine < min(logits.vocab, (at + 1) * segment)) {
      const auto keep = [&](int id, float, float x) {
        const float w = order_bits(x) >= cut ? weigh.of(x) : 0.f;
#pragma unroll
        for (int i = 0; i < 4; i++)
          if (id - mine == i) four[i] = w;
        if (w > 0.f) fallback = id;
      };
      logits.each4(mine, keep);
    }
    float reach = block_scan(four[0] + four[1] + four[2] + four[3], s, whole) + upto;
    const float start = reach - (four[0] + four[1] + four[2] + four[3]);
    if (reach > target && start <= target) {
      float run = start;
      int id = -1;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        run += four[i];
        if (id < 0 && four[i] > 0.f && (run > target || i == 3)) id = mine + i;
      }
      if (id < 0) id = fallback;
      atomicMax(&s.chosen, id);
    }
    upto += whole;
    __syncthreads();
    if (s.chosen >= 0) return s.chosen;
  }
  atomicMax(&s.chosen, fallback);
  __syncthreads();
  return s.chosen;
}

DEVICE int choose(const Logits& logits, const SampleRow& p, u64 best, u64 best_of_thread, SampleShared& s) {
  const Weigh weigh = {candidate_value(best), p.temperature, fminf(p.min_p, 1.f)};
  const float u = uniform(p);
  const int top_k = p.top_k > 0 && p.top_k < logits.vocab ? p.top_k : 0;
  int id = -1;
  if ((top_k > 0 && top_k <= EXACT_MAX) || (top_k == 0 && p.top_p < 1.f)) {
    const int found = gather_likeliest<false>(logits, best_of_thread, top_k > 0 ? top_k : min(EXACT_MAX, logits.vocab), s);
    if (found >= 0 && top_k > 0) id = pick_gathered(p, weigh, min(found, top_k), -1.f, u, s);
    if (found >= 0 && top_k == 0) {
      float sum = 0.f;
      logits.each([&](int, float, float x) { sum += weigh.of(x); });
      id = pick_gathered(p, weigh, found, block_sum(sum, s.scratch), u, s);
    }
    if (id >= 0) return id;
  }
  u32 cut = 0;
  if (top_k > 0) cut = bisect_cut<true>(logits, weigh, (float)top_k, s);
  if (p.top_p < 1.f) {
    float sum = 0.f;
    logits.each([&](int, float, float x) { if (order_bits(x) >= cut) sum += weigh.of(x); });
    const u32 nucleus = bisect_cut<false>(logits, weigh, fmaxf(p.top_p, 0.f) * block_sum(sum, s.scratch), s);
    cut = max(cut, nucleus);
  }
  cut = min(cut, order_bits(weigh.max));
  return pick_by_id(logits, weigh, cut, u, s);
}

KERNEL void __launch_bounds__(THREADS)
sample(const float* __restrict__ all_logits, const SampleRow* __restrict__ rows, u16* token_state,
       const int* __restrict__ bias_tokens, const float* __restrict__ bias_values, int* __restrict__ token_ids,
       float* __restrict__ logprobs, int* __restrict__ ranks, int* __restrict__ top_ids,
       float* __restrict__ top_logprobs, const u64* __restrict__ bests, int vocab, int row_stride, int state_stride,
       int top_max, int parts, int plain_only) {
  __shared__ SampleShared s;
  let_next_kernel_start();
  const SampleRow p = rows[blockIdx.x];  // not written by kernels
  wait_for_previous_kernels();
  if (!p.active) return;
  u16* state = p.state_slot >= 0 ? token_state + (u64)p.state_slot * state_stride : nullptr;
  const Logits logits = logits_of(p, all_logits, state, bias_tokens, bias_values, blockIdx.x, row_stride, vocab);
  const bool wants_logprobs = p.logprobs >= 0;
  float raw_sum = 0.f, raw_max = minus_infinity();
  int raw_id = threadIdx.x * 4;
  u64 best = 0;
  if (parts > 0 && is_greedy(p) && !wants_logprobs && !(plain_only && state != nullptr)) {
    for (int i = threadIdx.x; i < parts; i += THREADS) best = max(best, bests[(u64)blockIdx.x * parts + i]);
  } else {
    // Ids rise within a thread, so that the first of equals stays.
    float best_x = minus_infinity();
    int best_id = threadIdx.x * 4;
    logits.each([&](int id, float raw, float x) {
      if (x > best_x) best_x = x, best_id = id;
      if (wants_logprobs) {
        if (raw > raw_max) raw_sum *= exp2_fast((raw_max - raw) * LOG2E), raw_max = raw, raw_id = id;
        if (raw > minus_infinity()) raw_sum += exp2_fast((raw - raw_max) * LOG2E);
      }
    });
    best = candidate(best_x, best_id);
  }
  const u64 raw_best = candidate(raw_max, raw_id);
  const u64 best_of_thread = best;
  best = block_best(best, s);
  int id;
  if (candidate_value(best) == minus_infinity()) {  // nothing is possible: the lowest id that is not forbidden
    if (threadIdx.x == 0) {
      s.chosen = 0;
      for (int t = 0; t < vocab; t++) {
        bool forbidden = false;
        for (int i = 0; i < p.bias_count; i++)
          forbidden |= logits.bias_tokens[i] == t && logits.bias_values[i] == minus_infinity();
        if (!forbidden) { s.chosen = t; break; }
      }
    }
    __syncthreads();
    id = s.chosen;
  } else if (is_greedy(p)) {
    id = candidate_id(best);
  } else {
    id = choose(logits, p, best, best_of_thread, s);
    if (id < 0) id = candidate_id(best);
  }
  if (wants_logprobs) {
    const u64 most = block_best(raw_best, s);
    const float base = candidate_value(most);
    const float share = raw_max > minus_infinity() ? raw_sum * exp2_fast((raw_max - base) * LOG2E) : 0.f;
    const float normalizer = base + logf(block_sum(share, s.scratch));
    const float raw_chosen = tame(logits.row[id]);
    const u64 chosen = candidate(raw_chosen, id);
    float ahead = 0.f;
    logits.each([&](int other, float raw, float) { ahead += candidate(raw, other) > chosen ? 1.f : 0.f; });
    ahead = block_sum(ahead, s.scratch);
    if (threadIdx.x == 0) {
      logprobs[blockIdx.x] = raw_chosen > minus_infinity() ? raw_chosen - normalizer : -3.402823466e38f;
      ranks[blockIdx.x] = 1 + (int)ahead;
    }
    const int wanted = min(p.logprobs, top_max);
    if (wanted > 0) {
      const int found = gather_likeliest<true>(logits, raw_best, wanted, s);
      for (int i = threadIdx.x; i < wanted; i += THREADS) {
        const bool there = i < found;
        top_ids[(u64)blockIdx.x * top_max + i] = there ? candidate_id(s.sorted[i]) : -1;
        top_logprobs[(u64)blockIdx.x * top_max + i] = there ? candidate_value(s.sorted[i]) - normalizer : -3.402823466e38f;
      }
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    token_ids[blockIdx.x] = id;
    if (state != nullptr && (state[id] & STATE_COUNT) < STATE_COUNT) state[id]++;
  }
}
#undef THREADS
