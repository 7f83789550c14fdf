// All products between the attention of one layer and that of the next, for up to 64 rows, in one launch on Hopper:
//
//   h = residual + x Wo^T;  a = silu(g) u of norm(h) Wgu^T;  h = h + a Wd^T;
//   q, k, v = norm(h) Wqkv^T + bias, turned, k and v to the cache
//
// x [rows, attention], residual and h [rows, hidden], which may be one, a [rows, inner], qkv [rows, qkv] (only its queries
// are written), weights [hidden, attention], [2 inner, hidden], [hidden, inner], [qkv, hidden], norms [hidden], all bf16;
// sums in f32; caches and tables as in linear.cuh. hidden and qkv multiples of 64, the others of 8, head_dim / 2 of 32;
// hidden up to 960, attention and inner up to 6,144. Without qkv the last product falls away. Scratch: normed [64, hidden]
// bf16, squares [64, hidden / 16] f32; count: one u64 that begins at zero and is no other kernel's.
// Maps: boxes of 64 rows of x, normed and a; of weights 64 rows (o, down), 48 (gate_up), 32 (qkv).
//
// A tile is 64 rows by 64 rows of weights (gate_up: 96, so that every multiprocessor has one); the blocks of a cluster of 8
// divide k (qkv: four do; gate_up: none, they bring x for one another) and add up through distributed shared memory. The
// norms: who finishes a row of h also writes h times the norm's weights, and sums of its squares; the product behind scales
// its rows by what they come to. All blocks run at a time and wait for one another between products, counting in global
// memory; weights of the next product are under way by then.
// Grid: y = blocks, all of which run at a time; 256 threads: four warps compute, one brings weights, one rows, two find what
// rows are scaled by; dynamic shared memory: see chain.rs.
// Expected: 64 rows of the 0.5B shape on an H200 (2026-11-28) 20 us, where its seven kernels took 27; bytes of weights would
// take 6.8. Each product waits some 2,500 cycles for the one before and 1,200 for its first rows; the gated one takes 7,000,
// because all blocks together get no more than about 5.5 TB/s out of L2.

#define DEPTH 64  // of k at a time: a row of 128 bytes
#define ROWS 64
#define CLUSTER 8
#define COMPUTING 128
#define THREADS (COMPUTING + 64 + ROWS)
#define X_SLOTS 15
#define W_SLOTS 8
#define WAITS 3  // of all blocks for one another
#define X_BYTES (ROWS * DEPTH * 2)
#define W_BYTES 12288
#define COLUMNS 64  // rows of weights of a tile, but for gate_up
#define STRIDE (COLUMNS + 16)
#define PARTS_BYTES (ROWS * STRIDE * 4)
#define PARTS_SLOTS 3  // of x, the last ones, where only x of gate_up may lie; the sums of no product meet with that
#define SQUARES (X_SLOTS * DEPTH / 16 / 4)  // loads of a thread
#define STAGED_ROW 112  // bytes between rows of a gated tile: no two of eight meet in a bank

enum Which { O, GATE_UP, DOWN, QKV };

template <Which W> struct Tile {
  static constexpr int SPLIT = W == GATE_UP ? 1 : W == QKV ? 4 : CLUSTER;  // blocks that divide k
  static constexpr int BOXES = W == GATE_UP || W == QKV ? 2 : 1;            // of weights
  static constexpr int WIDTH = W == GATE_UP ? 48 : COLUMNS / BOXES;         // rows of a box: columns of y, pairs of qkv
  static constexpr int WEIGHTS = BOXES * WIDTH, OWN_ROWS = ROWS / SPLIT;
  static constexpr u32 BYTES = WEIGHTS * DEPTH * 2;  // of a step of k
};

struct Product {
  const TensorMap *x, *w;
  int units, k;  // columns of y, or pairs of them
  const bf16* norm_after;
  float eps;  // of the norm before
};

struct Chain {
  const bf16* residual;
  bf16 *h, *normed;
  float* squares;
  bf16* inner;
  u64* count;
  int rows, hidden;
  Operands qkv;  // y, bias, rows, n
  Places places;
};

struct WRing {
  int slot = 0;
  u32 parity = 0;
  DEVICE void next() {
    if (++slot == W_SLOTS) slot = 0, parity ^= 1;
  }
};

// What this block does of its cluster's tiles.
struct Share { int tile, begin, steps; };

struct Block {
  u8* parts;  // sums of this block's rows, from those that divide k [SPLIT][OWN_ROWS][STRIDE] f32
  float* scales;
  smem_t x_at, w_ring, parts_at, staged, x_full, w_full, w_empty, parts_full, parts_empty, begun, scaled;
  int rank, cluster, clusters;

  DEVICE Block(u8* shared) {
    const smem_t at = smem_address(shared);
    static_assert(PARTS_BYTES <= PARTS_SLOTS * X_BYTES);
    x_at = (at + 1023) / 1024 * 1024, parts_at = x_at + (X_SLOTS - PARTS_SLOTS) * X_BYTES;
    w_ring = x_at + X_SLOTS * X_BYTES, staged = w_ring + W_SLOTS * W_BYTES;
    const smem_t scales_at = staged + ROWS * STAGED_ROW;
    parts = shared + (parts_at - at), scales = (float*)(shared + (scales_at - at));
    x_full = scales_at + ROWS * 4, w_full = x_full + X_SLOTS * 8, w_empty = w_full + W_SLOTS * 8;
    parts_full = w_empty + W_SLOTS * 8, parts_empty = parts_full + 8, begun = parts_empty + 8;
    scaled = begun + WAITS * 8;
    rank = cluster_rank(), cluster = blockIdx.y / CLUSTER, clusters = gridDim.y / CLUSTER;
  }

  DEVICE void prepare_barriers() const {
    for (int s = 0; s < X_SLOTS; s++) barrier_init(x_full + s * 8, 1);
    for (int s = 0; s < W_SLOTS; s++) barrier_init(w_full + s * 8, 1), barrier_init(w_empty + s * 8, COMPUTING / 32);
    barrier_init(parts_full, 1), barrier_init(parts_empty, COMPUTING / 32 * CLUSTER);
    for (int i = 0; i < WAITS; i++) barrier_init(begun + i * 8, 1);
    barrier_init(scaled, ROWS), barrier_init(scaled + 8, ROWS);
    publish_barriers();
  }

  template <Which W> DEVICE int rounds(const Product& p) const {
    const int tiles = ceil_div(p.units, Tile<W>::WIDTH), groups = ceil_div(tiles * Tile<W>::SPLIT, CLUSTER);
    return max(0, ceil_div(groups - cluster, clusters));
  }
  template <Which W> DEVICE Share share(const Product& p, int round) const {
    constexpr int SPLIT = Tile<W>::SPLIT;
    const int all = ceil_div(p.k, DEPTH), each = ceil_div(all, SPLIT), begin = rank % SPLIT * each;
    const int tile = (cluster + round * clusters) * (CLUSTER / SPLIT) + rank / SPLIT;
    return {tile, begin, tile * Tile<W>::WIDTH < p.units ? max(0, min(all - begin, each)) : 0};
  }
};

template <Which W> DEVICE void bring_weights(const Block& b, const Product& p, const Places& places, WRing& ring) {
  typedef Tile<W> T;
  for (int round = 0, rounds = b.rounds<W>(p); round < rounds; round++) {
    const Share s = b.share<W>(p, round);
    const int first = W == QKV ? pair_row<ROTATED>(places, s.tile * T::WIDTH) : s.tile * T::WIDTH;
    const int second = first + (W == GATE_UP ? p.units : places.head_dim >> 1);
    for (int step = 0; step < s.steps; step++, ring.next()) {
      const smem_t to = b.w_ring + ring.slot * W_BYTES, full = b.w_full + ring.slot * 8;
      barrier_wait(b.w_empty + ring.slot * 8, ring.parity ^ 1);
      barrier_arrive_expect(full, T::BYTES);
      copy_box(to, p.w, (s.begin + step) * DEPTH, first, full);
      if (T::BOXES == 2) copy_box(to + T::BYTES / 2, p.w, (s.begin + step) * DEPTH, second, full);
    }
  }
}

// Rows, or a block's part of their columns, once for all tiles of a product: when the count is `until`, and those of the
// product before are not needed any more. Those who compute are told of it.
template <Which W> DEVICE void bring_rows(const Block& b, const Product& p, const u64* count, u64 until) {
  const int rounds = b.rounds<W>(p);
  const Share s = b.share<W>(p, 0);
  if (W == O) wait_for_previous_kernels();
  else wait_for_count(count, until);
  if (W != GATE_UP) {
    for (int step = 0; step < s.steps; step++) {
      barrier_arrive_expect(b.x_full + step * 8, X_BYTES);
      copy_box(b.x_at + step * X_BYTES, p.x, (s.begin + step) * DEPTH, 0, b.x_full + step * 8);
    }
  } else if (rounds > 0) {
    const int steps = ceil_div(p.k, DEPTH);
    for (int step = b.rank; step < steps; step += CLUSTER)
      copy_box_to_all(b.x_at + step * X_BYTES, p.x, step * DEPTH, 0, b.x_full + step * 8, (1 << CLUSTER) - 1);
    for (int step = 0; step < steps; step++) barrier_arrive_expect(b.x_full + step * 8, X_BYTES);
  }
  if (W != O) barrier_arrive(b.begun + (W == O ? 0 : W - GATE_UP) * 8);
}

// Where two neighbouring pairs of a head's elements go, and by how much they turn. Nothing here is written by kernels.
struct TurnTwo {
  float2 cosine, sine;
  bf16* to;  // null: nowhere
  DEVICE void find(const Chain& c, int m, int pair) {
    const Places& p = c.places;
    const int half = p.head_dim >> 1, head = pair / half, i = pair - head * half;
    cosine = {1.f, 1.f}, sine = {0.f, 0.f}, to = nullptr;
    if (m >= c.rows || pair * 2 >= c.qkv.n) return;
    if (head < p.heads + p.kv_heads) {
      const u64 at = (u64)p.positions[m] * half + i;
      cosine = *(const float2*)(p.cos_table + at), sine = *(const float2*)(p.sin_table + at);
    }
    if (head < p.heads) {
      to = (bf16*)c.qkv.y + (u64)m * c.qkv.n + head * p.head_dim + i;
      return;
    }
    const int slot = p.slots[m], kv_head = (head - p.heads) % p.kv_heads;
    bf16* const cache = head < p.heads + p.kv_heads ? p.key_cache : p.value_cache;
    if (slot >= 0) to = cache + (((u64)(slot >> 4) * p.kv_heads + kv_head) * 16 + (slot & 15)) * p.head_dim + i;
  }
  // The first halves of both pairs, then the second.
  DEVICE void store(float a0, float a1, float b0, float b1, int half) const {
    if (to == nullptr) return;
    a0 = rounded(a0), a1 = rounded(a1), b0 = rounded(b0), b1 = rounded(b1);
    *(u32*)to = pack_bf16(a0 * cosine.x - b0 * sine.x, a1 * cosine.y - b1 * sine.y);
    *(u32*)(to + half) = pack_bf16(b0 * cosine.x + a0 * sine.x, b1 * cosine.y + a1 * sine.y);
  }
};

// What the rows of h come to, a thread each: while a product runs that is scaled by it.
template <Which W> DEVICE void find_scale(const Block& b, const Chain& c, int row, float eps) {
  barrier_wait(b.begun + (W - GATE_UP) * 8, 0);
  const int parts = c.hidden / 16;
  float4 v[SQUARES];
#pragma unroll
  for (int i = 0; i < SQUARES; i++) {
    v[i] = {0.f, 0.f, 0.f, 0.f};
    if (row < c.rows && i * 4 < parts) v[i] = load_fresh16(c.squares + row * parts + i * 4);
  }
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < SQUARES; i++) sum += (v[i].x + v[i].y) + (v[i].z + v[i].w);
  b.scales[row] = rsqrtf(sum / (float)c.hidden + eps);
  barrier_arrive(b.scaled + (W == QKV) * 8);
}

// The warps that compute.
struct Computing {
  const Block& b;
  const Chain& c;
  const tile_t x_tile, w_tile;
  int warp, lane;
  WRing ring;
  u32 x_parities = 0, exchanges = 0, frees = 0;
  TurnTwo turns[2];
  u32 bias[2];

  DEVICE Computing(const Block& block, const Chain& chain)
      : b(block), c(chain), x_tile(base_tile(b.x_at, 1024, 16)), w_tile(base_tile(b.w_ring, 1024, 16)) {
    // From the first lane: the same in all, so that descriptors need no registers of each.
    warp = __shfl_sync(FULL_WARP, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  }

  // x is waited for by the first tile of a product.
  template <Which W> DEVICE void multiply(float (&d)[Tile<W>::WEIGHTS / 8][4], int steps, bool first) {
#pragma unroll
    for (int j = 0; j < Tile<W>::WEIGHTS / 8; j++) d[j][0] = d[j][1] = d[j][2] = d[j][3] = 0.f;
    int before = -1;
    for (int step = 0; step < steps; step++, ring.next()) {
      const tile_t x = moved_tile(x_tile, step * X_BYTES), w = moved_tile(w_tile, ring.slot * W_BYTES);
      barrier_wait(b.w_full + ring.slot * 8, ring.parity);
      if (first) barrier_wait(b.x_full + step * 8, x_parities >> step & 1);
      wgmma_settle(d);
      wgmma_fence();
#pragma unroll
      for (int s = 0; s < DEPTH / 16; s++) wgmma_shared(d, moved_tile(x, s * 32), moved_tile(w, s * 32), 1);
      wgmma_commit();
      wgmma_wait<1>();  // those of the step before are done
      if (before >= 0 && lane == 0) barrier_arrive(b.w_empty + before * 8);
      before = ring.slot;
    }
    wgmma_wait<0>();
    wgmma_settle(d);
    if (before >= 0 && lane == 0) barrier_arrive(b.w_empty + before * 8);
    if (first) x_parities ^= (1u << steps) - 1;
  }
  // A block without a tile has been brought x all the same.
  DEVICE void pass_over(const Product& p) {
    const int steps = ceil_div(p.k, DEPTH);
    for (int step = 0; step < steps; step++) barrier_wait(b.x_full + step * 8, x_parities >> step & 1);
    x_parities ^= (1u << steps) - 1;
  }

  // Until all blocks have done the product before.
  template <Which W> DEVICE void wait_for_all() const { barrier_wait(b.begun + (W - GATE_UP) * 8, 0); }
  DEVICE void tell_all() const {
    named_wait(1, COMPUTING);
    if (threadIdx.x == 0) count_up(c.count);
  }

  DEVICE void gate_up(const Product& p) {
    typedef Tile<GATE_UP> T;
    float scales[2];
    const smem_t staged = b.staged + warp * 16 * STAGED_ROW;
    const int rounds = b.rounds<GATE_UP>(p);
    for (int round = 0; round < rounds; round++) {
      const Share s = b.share<GATE_UP>(p, round);
      float d[T::WEIGHTS / 8][4];
      if (s.steps == 0 && round == 0) pass_over(p);
      multiply<GATE_UP>(d, s.steps, round == 0 && s.steps > 0);
      if (round == 0) {
        barrier_wait(b.scaled, 0);
        scales[0] = b.scales[warp * 16 + (lane >> 2)], scales[1] = b.scales[warp * 16 + (lane >> 2) + 8];
      }
#pragma unroll
      for (int j = 0; j < T::WIDTH / 8; j += 2) {
        u32 v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float scale = scales[i & 1], *g = &d[j + (i >> 1)][(i & 1) * 2], *u = &d[j + (i >> 1) + T::WIDTH / 8][(i & 1) * 2];
          const float gates[2] = {g[0] * scale, g[1] * scale}, ups[2] = {u[0] * scale, u[1] * scale};
          v[i] = gate_pair(gates, ups);
        }
        stmatrix_x4(staged + (lane & 15) * STAGED_ROW + (j + (lane >> 4)) * 16, v);
      }
      __syncwarp();
#pragma unroll
      for (int i = lane; i < 16 * (T::WIDTH / 8); i += 32) {
        const int row = i / (T::WIDTH / 8), piece = i % (T::WIDTH / 8), column = s.tile * T::WIDTH + piece * 8;
        const u32x4 v = load_shared16(staged + row * STAGED_ROW + piece * 16);
        if (warp * 16 + row < c.rows && column < p.units) *(u32x4*)(c.inner + (u64)(warp * 16 + row) * p.units + column) = v;
      }
      __syncwarp();
    }
  }

  // Rows eight apart would meet in a bank.
  DEVICE static u32 place(int part, int own_rows, int r, int column) {
    return ((part * own_rows + r % own_rows) * STRIDE + (column ^ (r & 8))) * 4;
  }

  // Sums to the block that finishes their row.
  template <Which W> DEVICE void exchange(const float (&d)[COLUMNS / 8][4], int round) {
    constexpr int SPLIT = Tile<W>::SPLIT, OWN_ROWS = Tile<W>::OWN_ROWS;
    // Between products all blocks have waited for one another.
    if (round > 0) barrier_wait_in_cluster(b.parts_empty, frees++ & 1);
    if (threadIdx.x == 0) barrier_arrive_expect(b.parts_full, SPLIT * OWN_ROWS * COLUMNS * 4);
    const bool odd = lane & 1;
    const int r = warp * 16 + (lane >> 2) + odd * 8, owner = b.rank / SPLIT * SPLIT + r / OWN_ROWS;
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j++) {
      // A lane gets four columns of one row: it gives its neighbour what it has of the other.
      const float u = __shfl_xor_sync(FULL_WARP, odd ? d[j][0] : d[j][2], 1);
      const float v = __shfl_xor_sync(FULL_WARP, odd ? d[j][1] : d[j][3], 1);
      const smem_t to = b.parts_at + place(b.rank % SPLIT, OWN_ROWS, r, j * 8 + (lane & 2) * 2);
      if (odd) send_in_cluster4(to, owner, b.parts_full, u, v, d[j][2], d[j][3]);
      else send_in_cluster4(to, owner, b.parts_full, d[j][0], d[j][1], u, v);
    }
    barrier_wait_in_cluster(b.parts_full, exchanges++ & 1);
  }
  // They may be written again, if there is another round.
  DEVICE void parts_read(bool again) const {
    if (!again) return;
    __syncwarp();
    if (lane < CLUSTER) barrier_arrive_in_cluster(b.parts_empty, lane);
  }

  // h = h + x W^T for 64 columns, eight rows a block, and its norm's beginnings.
  template <Which W> DEVICE void add(const Product& p) {
    constexpr int OWN_ROWS = Tile<W>::OWN_ROWS;
    static_assert(OWN_ROWS * COLUMNS == COMPUTING * 4);
    const int r = b.rank * OWN_ROWS + threadIdx.x / 16, at = threadIdx.x % 16 * 4;
    for (int round = 0, rounds = b.rounds<W>(p); round < rounds; round++) {
      const Share s = b.share<W>(p, round);
      const int column = s.tile * COLUMNS + at;
      const bool there = r < c.rows;
      u32x2 before = {{0, 0}}, weights = {{0, 0}};
      if (there) {
        before = load_fresh8((W == O ? c.residual : c.h) + (u64)r * c.hidden + column);
        weights = *(const u32x2*)(p.norm_after + column);
      }
      float d[COLUMNS / 8][4];
      multiply<W>(d, s.steps, round == 0);
      exchange<W>(d, round);
      float4 sum = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int part = 0; part < CLUSTER; part++) {
        const float4 v = *(const float4*)(b.parts + place(part, OWN_ROWS, r, at));
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
      }
      parts_read(round + 1 < rounds);  // before anything is stored, which it would wait for
      const u32 low = pack_bf16(sum.x + low_bf16(before.r[0]), sum.y + high_bf16(before.r[0]));
      const u32 high = pack_bf16(sum.z + low_bf16(before.r[1]), sum.w + high_bf16(before.r[1]));
      const float h[4] = {low_bf16(low), high_bf16(low), low_bf16(high), high_bf16(high)};
      float square = h[0] * h[0] + h[1] * h[1] + h[2] * h[2] + h[3] * h[3];
      square += __shfl_xor_sync(FULL_WARP, square, 1);
      square += __shfl_xor_sync(FULL_WARP, square, 2);
      if (there) {
        *(u32x2*)(c.normed + (u64)r * c.hidden + column) = {{mul_bf16x2(low, weights.r[0]), mul_bf16x2(high, weights.r[1])}};
        if (at % 16 == 0) c.squares[r * (c.hidden / 16) + column / 16] = square;
        *(u32x2*)(c.h + (u64)r * c.hidden + column) = {{low, high}};
      }
    }
  }

  // Where this thread's pairs of packed heads go. Nothing that it reads is written by kernels.
  DEVICE int qkv_row(int i) const { return b.rank % Tile<QKV>::SPLIT * Tile<QKV>::OWN_ROWS + threadIdx.x / 16 + i * 8; }
  DEVICE void prepare_qkv(const Product& p, int round) {
    const int pair = b.share<QKV>(p, round).tile * Tile<QKV>::WIDTH + threadIdx.x % 16 * 2;
    turns[0].find(c, qkv_row(0), pair), turns[1].find(c, qkv_row(1), pair);
    bias[0] = bias[1] = 0;
    if (c.qkv.bias == nullptr || pair >= p.units) return;
    const bf16* from = c.qkv.bias + pair_row<ROTATED>(c.places, pair);
    bias[0] = *(const u32*)from, bias[1] = *(const u32*)(from + (c.places.head_dim >> 1));
  }
  DEVICE void qkv(const Product& p) {
    constexpr int OWN_ROWS = Tile<QKV>::OWN_ROWS, HALF = Tile<QKV>::WIDTH;
    static_assert(OWN_ROWS * HALF / 2 == COMPUTING * 2);
    const int half = c.places.head_dim >> 1, at = threadIdx.x % 16 * 2;
    for (int round = 0, rounds = b.rounds<QKV>(p); round < rounds; round++) {
      const Share s = b.share<QKV>(p, round);
      if (round > 0) prepare_qkv(p, round);
      float d[COLUMNS / 8][4];
      multiply<QKV>(d, s.steps, round == 0);
      exchange<QKV>(d, round);
      if (round == 0) barrier_wait(b.scaled + 8, 0);
      float2 sums[2][2] = {{{0.f, 0.f}, {0.f, 0.f}}, {{0.f, 0.f}, {0.f, 0.f}}};
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int part = 0; part < Tile<QKV>::SPLIT; part++) {
          const float2 v = *(const float2*)(b.parts + place(part, OWN_ROWS, qkv_row(i >> 1), at + (i & 1) * HALF));
          sums[i >> 1][i & 1].x += v.x, sums[i >> 1][i & 1].y += v.y;
        }
      parts_read(round + 1 < rounds);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const float scale = b.scales[qkv_row(i)], *x = &sums[i][0].x, *y = &sums[i][1].x;
        turns[i].store(x[0] * scale + low_bf16(bias[0]), x[1] * scale + high_bf16(bias[0]), y[0] * scale + low_bf16(bias[1]),
                       y[1] * scale + high_bf16(bias[1]), half);
      }
    }
  }
};

KERNEL void __launch_bounds__(THREADS, 1)
chain_linear(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap o_map,
             const __grid_constant__ TensorMap normed_map, const __grid_constant__ TensorMap gate_up_map,
             const __grid_constant__ TensorMap inner_map, const __grid_constant__ TensorMap down_map,
             const __grid_constant__ TensorMap qkv_map, const bf16* residual, bf16* h, bf16* normed, float* squares,
             bf16* inner, u64* count, const bf16* mlp_norm, const bf16* next_norm, const bf16* qkv_bias, bf16* qkv_out,
             const int* positions, const int* slots, const float* cos_table, const float* sin_table, bf16* key_cache, bf16* value_cache, int rows,
             int hidden, int attention, int inner_width, int qkv_width, int heads, int kv_heads, int head_dim, float mlp_eps,
             float next_eps) {
  DYNAMIC_SHARED(shared);
  let_next_kernel_start();
  const Places places = {positions, slots, cos_table, sin_table, key_cache, value_cache, heads, kv_heads, head_dim};
  const Operands qkv_operands = {nullptr, nullptr, nullptr, qkv_bias, nullptr, qkv_out, rows, qkv_width, hidden, 0.f, 0};
  const Chain c = {residual, h, normed, squares, inner, count, rows, hidden, qkv_operands, places};
  const Product o = {&x_map, &o_map, hidden, attention, mlp_norm, 0.f};
  const Product gate_up = {&normed_map, &gate_up_map, inner_width, hidden, nullptr, mlp_eps};
  const Product down = {&inner_map, &down_map, hidden, inner_width, next_norm, 0.f};
  const Product qkv = {&normed_map, &qkv_map, qkv_width / 2, hidden, nullptr, next_eps};
  const Block b(shared);
  if (threadIdx.x == COMPUTING) b.prepare_barriers();
  if (threadIdx.x == COMPUTING + 32) {
    const TensorMap* const maps[] = {&x_map, &normed_map, &inner_map, &o_map, &gate_up_map, &down_map, &qkv_map};
#pragma unroll
    for (int i = 0; i < 7; i++) prefetch_map(maps[i]);
  }
  __syncthreads();
  cluster_arrive();
  if (threadIdx.x == COMPUTING) {
    WRing ring;
    bring_weights<O>(b, o, places, ring);
    bring_weights<GATE_UP>(b, gate_up, places, ring);
    bring_weights<DOWN>(b, down, places, ring);
    bring_weights<QKV>(b, qkv, places, ring);
  }
  if (threadIdx.x >= COMPUTING) __syncwarp();
  // All have begun: their memory may be written. The warp that brings weights does not write to others'.
  if (threadIdx.x < COMPUTING || threadIdx.x >= COMPUTING + 32) cluster_wait();
  if (threadIdx.x == COMPUTING + 32) {
    bring_rows<O>(b, o, count, 0);
    const u64 each = WAITS * (u64)gridDim.y, now = count_now(count), before = now - now % each;
    bring_rows<GATE_UP>(b, gate_up, count, before + gridDim.y);
    bring_rows<DOWN>(b, down, count, before + 2 * gridDim.y);
    if (qkv_width > 0) bring_rows<QKV>(b, qkv, count, before + 3 * gridDim.y);
  }
  if (threadIdx.x >= COMPUTING + 64) {
    const int row = threadIdx.x - COMPUTING - 64;
    find_scale<GATE_UP>(b, c, row, mlp_eps);
    if (qkv_width > 0) find_scale<QKV>(b, c, row, next_eps);
  }
  if (threadIdx.x < COMPUTING) {
    Computing computing(b, c);
    computing.prepare_qkv(qkv, 0);
    wait_for_previous_kernels();
    computing.add<O>(o);
    computing.tell_all();
    computing.wait_for_all<GATE_UP>();
    computing.gate_up(gate_up);
    computing.tell_all();
    computing.wait_for_all<DOWN>();
    computing.add<DOWN>(down);
    computing.tell_all();
    if (qkv_width > 0) computing.wait_for_all<QKV>(), computing.qkv(qkv);
  }
  __syncwarp();
  if (threadIdx.x >= COMPUTING && threadIdx.x < COMPUTING + 32) cluster_wait();
  // Nobody leaves while others may still reach its memory.
  cluster_arrive();
  cluster_wait();
}

#undef CLUSTER
#undef COLUMNS
#undef COMPUTING
#undef DEPTH
#undef PARTS_BYTES
#undef PARTS_SLOTS
#undef ROWS
#undef SQUARES
#undef STAGED_ROW
#undef STRIDE
#undef THREADS
#undef WAITS
#undef W_BYTES
#undef W_SLOTS
#undef X_BYTES
#undef X_SLOTS
