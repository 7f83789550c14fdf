// q, k and v of many rows, on Hopper: y = x W^T (+ bias), of which q goes to y rotated, k rotated and v as it is to the
// paged cache.
//
//   wide_rotated_n192_d64, _n64_d64   heads of 64
//   wide_rotated_n256_d128            heads of 128
//
// x, w, maps and grid as in wide.cuh; n = (heads + 2 kv_heads) HEAD_DIM, columns packed [q heads | k heads | v heads]; bias
// [n] or null. y [rows, n]: the columns of q; those of k and v stay as they were. positions, slots [rows] i32, cosines and
// sines [positions, HEAD_DIM / 2] f32 and caches [blocks, kv_heads, 16, HEAD_DIM] as in qk_norm_rope_kv_write.cu: heads
// rotate whole, element i with i + HEAD_DIM / 2, and a negative slot writes nothing. Sums are rounded to bf16 before they
// are rotated, as where product and rotation are two launches.
//
// A tile is whole heads, and a thread has both elements of a pair: HEAD_DIM / 16 accumulators apart. The rows' positions,
// slots and bias are loaded before a tile's products, cosines and sines beside the last of them. Narrow tiles are for steps
// of few hundred rows, of which wide ones are too few for the card.
// Saved is reading and writing all of q, k and v: 38 MB at 8,192 rows of 1,152 columns.
// Expected on an H200 (2026-11-28): 8,431 rows of 1,152 x 896 30 us (cuBLASLt and the rotation behind it 37), 512 rows 7.6
// (7.9); 8,431 rows of 6,144 x 4,096 648 (652).

template <int HEAD_DIM, int COLUMNS> struct Rotated {
  const bf16* bias;
  bf16* out;
  const int *positions, *slots;
  const float *cos_table, *sin_table;
  bf16 *key_cache, *value_cache;
  int rows, n, k, heads, kv_heads;

  static constexpr bool GATED = false, EARLY = true;
  static constexpr int HALF = HEAD_DIM / 16;   // accumulators of half a head
  static constexpr int ROW = HEAD_DIM * 2;     // bytes
  static constexpr int PIECES = ROW / 16;      // lanes that move a row
  static constexpr int AT_ONCE = 32 / PIECES;  // rows that a warp moves

  struct Kept {
    int position[2];         // of this thread's rows
    int slot;                // of the warp's row `lane`
    u32 bias[COLUMNS / 64];  // of the tile: two columns a lane, one lane after the other
    float2 cosine[HALF][2], sine[HALF][2];
  };

  DEVICE void begin(int row, int column, Kept& kept) const {
    const int lane = threadIdx.x & 31, r = row + (lane >> 2);
    kept.position[0] = r < rows ? positions[r] : 0;
    kept.position[1] = r + 8 < rows ? positions[r + 8] : 0;
    kept.slot = lane < 16 && row + lane < rows ? slots[row + lane] : -1;
#pragma unroll
    for (int i = 0; i < COLUMNS / 64; i++) {
      const int c = column + (i * 32 + lane) * 2;
      kept.bias[i] = bias != nullptr && c < n ? *(const u32*)(bias + c) : 0;
    }
  }

  DEVICE void near_end(int column, Kept& kept) const {
    if (column >= (heads + kv_heads) * HEAD_DIM) return;  // values
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const u64 at = (u64)kept.position[h] * (HEAD_DIM / 2) + (threadIdx.x & 3) * 2;
#pragma unroll
      for (int j = 0; j < HALF; j++) {
        kept.cosine[j][h] = *(const float2*)(cos_table + at + j * 8);
        kept.sine[j][h] = *(const float2*)(sin_table + at + j * 8);
      }
    }
  }

  // The head whose accumulators begin at `first`, to shared memory: piece c of row r at piece c ^ (r % 8).
  template <bool TURNED, int TILES>
  DEVICE void round_and_turn(smem_t own, const float (&d)[TILES][4], int first, int lane, const Kept& kept) const {
    const smem_t to = own + (lane & 15) * ROW + ((((lane >> 4) * HALF) ^ (lane & 7)) << 4);
#pragma unroll
    for (int j = 0; j < HALF; j++) {
      const auto bias_of = [&](int tile) { return __shfl_sync(FULL_WARP, kept.bias[tile / 8], tile % 8 * 4 + (lane & 3)); };
      const u32 bias_a = bias_of(first + j), bias_b = bias_of(first + HALF + j);
      const float(&sum_a)[4] = d[first + j], (&sum_b)[4] = d[first + HALF + j];
      u32 v[4];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        u32 a = pack_bf16(sum_a[2 * h] + low_bf16(bias_a), sum_a[2 * h + 1] + high_bf16(bias_a));
        u32 b = pack_bf16(sum_b[2 * h] + low_bf16(bias_b), sum_b[2 * h + 1] + high_bf16(bias_b));
        if (TURNED) {
          const float2 c = kept.cosine[j][h], s = kept.sine[j][h];
          const float a0 = low_bf16(a), a1 = high_bf16(a), b0 = low_bf16(b), b1 = high_bf16(b);
          a = pack_bf16(a0 * c.x - b0 * s.x, a1 * c.y - b1 * s.y);
          b = pack_bf16(b0 * c.x + a0 * s.x, b1 * c.y + a1 * s.y);
        }
        v[h] = a, v[2 + h] = b;
      }
      stmatrix_x4(to ^ (j << 4), v);
    }
  }

  // From there to where the rows of this head belong.
  DEVICE void write(smem_t own, int head, int row, int lane, const Kept& kept) const {
    const int r0 = lane / PIECES, c = lane % PIECES, kv_head = head - heads, value_head = kv_head - kv_heads;
    const smem_t from = own + r0 * ROW + ((c ^ r0) << 4);
    // Of the warp's row `lane`: which row of `stride` elements each.
    int mine = kept.slot < 0 ? -1 : (kept.slot >> 4) * kv_heads * 16 + (kept.slot & 15), stride = HEAD_DIM;
    bf16* to = value_head < 0 ? key_cache + kv_head * 16 * HEAD_DIM : value_cache + value_head * 16 * HEAD_DIM;
    if (kv_head < 0) mine = row + (lane & 15) < rows ? row + (lane & 15) : -1, stride = n, to = out + head * HEAD_DIM;
    to += c * 8;
#pragma unroll
    for (int i = 0; i < 16; i += 4 * AT_ONCE) {
      u32x4 v[4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int r = i + j * AT_ONCE;
        v[j] = load_shared16((from ^ ((r & 7) << 4)) + r * ROW);
      }
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int at = __shfl_sync(FULL_WARP, mine, i + j * AT_ONCE + r0);
        if (at >= 0) *(u32x4*)(to + (u64)(u32)at * stride) = v[j];
      }
    }
  }

  template <int TILES>
  DEVICE void finish(const float (&d)[TILES][4], smem_t own, int row, int column, const Kept& kept) const {
    const int lane = anew(threadIdx.x & 31);
#pragma unroll
    for (int h = 0; h < COLUMNS / HEAD_DIM; h++) {
      const int head = column / HEAD_DIM + h;
      if (head >= heads + 2 * kv_heads) return;
      if (head < heads + kv_heads) round_and_turn<true>(own, d, h * 2 * HALF, lane, kept);
      else round_and_turn<false>(own, d, h * 2 * HALF, lane, kept);
      __syncwarp();
      write(own, head, row, lane, kept);
      __syncwarp();
    }
  }
};

#define ROTATED(NAME, HEAD_DIM, COLUMNS)                                                                                   \
  KERNEL void __launch_bounds__(THREADS, 1)                                                                                \
  NAME(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, const bf16* bias, bf16* out,      \
       const int* positions, const int* slots, const float* cos_table, const float* sin_table, bf16* key_cache,            \
       bf16* value_cache, int rows, int n, int k, int heads, int kv_heads) {                                               \
    multiply<Rotated<HEAD_DIM, COLUMNS>, COLUMNS>(&x_map, &w_map, {bias, out, positions, slots, cos_table, sin_table,      \
                                                                   key_cache, value_cache, rows, n, k, heads, kv_heads});  \
  }
ROTATED(wide_rotated_n192_d64, 64, 192)
ROTATED(wide_rotated_n64_d64, 64, 64)
ROTATED(wide_rotated_n256_d128, 128, 256)
#undef ROTATED
