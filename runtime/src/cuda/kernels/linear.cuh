// What surrounds the products of fused_linear.cu and tile_linear.cu: their operands, and what happens to a result. Precedes
// both files.

struct Places {
  const int *positions, *slots;
  const float *cos_table, *sin_table;
  bf16 *key_cache, *value_cache;
  int heads, kv_heads, head_dim;
};

struct Operands {
  const bf16 *weights, *x, *norm, *bias, *add;
  void* y;
  int rows, n, k;
  float eps;
  int out_f32;
  DEVICE float extra(int m, int column) const {
    float v = bias != nullptr ? to_float(bias[column]) : 0.f;
    if (add != nullptr) v += to_float(add[(u64)m * n + column]);
    return v;
  }
  DEVICE void store(int m, int column, float v) const {
    const u64 at = (u64)m * n + column;
    if (out_f32) ((float*)y)[at] = v;
    else ((bf16*)y)[at] = to_bf16(v);
  }
};

enum After { PLAIN, GATED, ROTATED };

DEVICE float rounded(float v) { return to_float(to_bf16(v)); }
DEVICE float gate(float g, float up) {
  g = rounded(g);
  return __fdividef(g, 1.f + exp2_fast(-g * LOG2E)) * rounded(up);
}

// Where one pair of a head's elements goes, and by how much it turns. Made before the wait: nothing here is written by
// kernels.
struct Turn {
  float cosine, sine;
  bf16* to;  // null: nowhere; its partner is half a head further
  int half;
  Turn() = default;
  DEVICE Turn(const Operands& o, const Places& p, int m, int pair) : cosine(1.f), sine(0.f), to(nullptr) {
    half = p.head_dim >> 1;
    if (m >= o.rows) return;
    const int head = pair / half, i = pair - head * half;
    if (head < p.heads + p.kv_heads) {
      const u64 at = (u64)p.positions[m] * half + i;
      cosine = p.cos_table[at], sine = p.sin_table[at];
    }
    if (head < p.heads) {
      to = (bf16*)o.y + (u64)m * o.n + head * p.head_dim + i;
    } else {
      const int slot = p.slots[m], kv_head = head - p.heads;
      const bool is_value = kv_head >= p.kv_heads;
      if (slot >= 0)
        to = (is_value ? p.value_cache : p.key_cache) +
             (((u64)(slot >> 4) * p.kv_heads + (is_value ? kv_head - p.kv_heads : kv_head)) * 16 + (slot & 15)) * p.head_dim + i;
    }
  }
  DEVICE void store(float a, float b) const {
    a = rounded(a), b = rounded(b);
    if (to == nullptr) return;
    to[0] = to_bf16(a * cosine - b * sine);
    to[half] = to_bf16(b * cosine + a * sine);
  }
};

// First weight row of pair p, and how far the second is.
template <After AFTER> DEVICE int pair_row(const Places& p, int pair) {
  if (AFTER != ROTATED) return pair;
  const int half = p.head_dim >> 1;
  return pair / half * p.head_dim + pair % half;
}
// x0, x1: a fragment of 8 rows of x and 16 of k, right operand of mma. Adds x x^T, of which the diagonal is wanted.
DEVICE void add_squares(float (&sum)[2], u32 x0, u32 x1) { mma_bf16_top(sum, x0, x1, x0, x1); }
// A lane's element of the diagonal, if it has one: row lane / 4.
DEVICE bool diagonal(const float (&sum)[2], int lane, float& value) {
  const int g = lane >> 2, c = lane & 3;
  value = g & 1 ? sum[1] : sum[0];
  return g >> 1 == c;
}

template <After AFTER> DEVICE int pair_apart(const Operands& o, const Places& p) { return AFTER == ROTATED ? p.head_dim >> 1 : o.n; }

#define FUSED(NAME, BOUNDS, BODY)                                                                                       \
  KERNEL void __launch_bounds__(BOUNDS)                                                                                 \
      NAME(const bf16* weights, const bf16* x, const bf16* norm, const bf16* bias, const bf16* add, void* y, int rows,   \
           int n, int k, float eps, int out_f32, const int* positions, const int* slots,                   \
           const float* cos_table, const float* sin_table, bf16* key_cache, bf16* value_cache, int heads, int kv_heads,  \
           int head_dim) {                                                                                               \
    const Operands o = {weights, x, norm, bias, add, y, rows, n, k, eps, out_f32};                               \
    const Places p = {positions, slots, cos_table, sin_table, key_cache, value_cache, heads, kv_heads, head_dim};        \
    BODY(o, p);                                                                                                          \
  }
#define COMMA ,
