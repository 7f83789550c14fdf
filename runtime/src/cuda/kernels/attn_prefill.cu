// Paged causal attention of prefill chunks on the tensor cores (FlashAttention 2 by mma.sync; every card from sm_80).
//
// q: rows of packed QKV at qkv + row * q_stride, already rotated. Sequence s has rows query_start[s] .. query_start[s + 1]
// and context_len[s] tokens in the cache, its chunk included: row i stands at position context_len - rows + i and sees
// every key up to its own (the last `window` of them, if window > 0). Caches [blocks, kv_heads, 16, HEAD_DIM] bf16;
// block_table [sequences, max_blocks] i32. out rows of heads * HEAD_DIM bf16. Sequences first .. last of the step.
// Grid: (heads, tiles), tiles being the sum over sequences of ceil(rows / 128), or more; 128 threads. Dynamic shared memory:
// (128 + 4 * KEY_TILE) * (HEAD_DIM + 8) * 2 bytes. The longest rows start first.
//
// A block takes 128 queries of one head, a warp 32 of them: each fragment of K or V that it reads from shared memory
// feeds two mma. K and V tiles are double-buffered by cp.async. Rows are padded by 16 bytes: no bank conflicts.
// Expected: flops, 4 * HEAD_DIM * heads * (query, key) pairs; mma.sync reaches about 60 % of 812 TFLOP/s on sm_90;
// 331 at 8,192 tokens and head_dim 128.

#define ROWS 128
#define WARPS 4
#define STRIDE ((HEAD_DIM + 8) * 2)  // bytes
#define CHUNKS (HEAD_DIM / 8)        // 16-byte pieces of a row
#define KEY_TILES (KEY_TILE / 8)
#define DIM_STEPS (HEAD_DIM / 16)



struct PrefillTile { int sequence, row; };

// Which sequence and which of its rows this block has; sequence -1 when the grid is larger than the work.
DEVICE PrefillTile find_tile(const int* query_start, int first, int last, int tile) {
  const int lane = threadIdx.x & 31;
  for (int s = first; s < last; s += 32) {
    const int mine = s + lane < last ? ceil_div(query_start[s + lane + 1] - query_start[s + lane], ROWS) : 0;
    int upto = mine;
#pragma unroll
    for (int o = 1; o < 32; o <<= 1) {
      const int before = __shfl_up_sync(FULL_WARP, upto, o);
      if (lane >= o) upto += before;
    }
    const u32 reached = __ballot_sync(FULL_WARP, tile < upto);
    if (reached) {
      const int at = __ffs(reached) - 1;
      return {s + at, (tile - __shfl_sync(FULL_WARP, upto - mine, at)) * ROWS};
    }
    tile -= __shfl_sync(FULL_WARP, upto, 31);
  }
  return {-1, 0};
}

struct KeyTiles {
  const bf16 *keys, *values;  // of this KV head
  const int* blocks;          // of this sequence
  u64 block_stride;
  int end;                    // keys from here on read as zeros
  DEVICE void load(smem_t to_keys, smem_t to_values, int key0) const {
    int at_block[KEY_TILE / 16];  // all block numbers first: their loads overlap
#pragma unroll
    for (int b = 0; b < KEY_TILE / 16; b++) at_block[b] = key0 + b * 16 < end ? blocks[(key0 >> 4) + b] : 0;
#pragma unroll
    for (int j = 0; j < (KEY_TILE * CHUNKS + WARPS * 32 - 1) / (WARPS * 32); j++) {
      const int i = threadIdx.x + j * (WARPS * 32), r = i / CHUNKS, c = i - r * CHUNKS, key = key0 + r;
      if (KEY_TILE * CHUNKS % (WARPS * 32) != 0 && r >= KEY_TILE) break;
      int block = at_block[0];
#pragma unroll
      for (int b = 1; b < KEY_TILE / 16; b++)
        if (r >> 4 == b) block = at_block[b];
      const bool valid = key < end;
      const u64 at = valid ? (u64)block * block_stride + (key & 15) * HEAD_DIM + c * 8 : 0;
      copy_async_16(to_keys + r * STRIDE + c * 16, keys + at, valid);
      copy_async_16(to_values + r * STRIDE + c * 16, values + at, valid);
    }
  }
};

KERNEL void __launch_bounds__(WARPS * 32, 2)
attn_prefill(const bf16* __restrict__ qkv, int q_stride, const bf16* __restrict__ key_cache,
             const bf16* __restrict__ value_cache, const int* __restrict__ query_start,
             const int* __restrict__ context_len, const int* __restrict__ block_table, bf16* __restrict__ out,
             int max_blocks, int first, int last, int kv_heads, float scale, float softcap, int window, int heads,
             int tiles) {
  DYNAMIC_SHARED(shared);
  let_next_kernel_start();
  wait_for_previous_kernels();
  const int head = blockIdx.x, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const PrefillTile tile = find_tile(query_start, first, last, tiles - 1 - blockIdx.y);
  if (tile.sequence < 0) return;
  const int row_begin = query_start[tile.sequence], rows = query_start[tile.sequence + 1] - row_begin;
  const int context = context_len[tile.sequence], position0 = context - rows + tile.row;
  const int kv_head = head / (heads / kv_heads);

  const smem_t q_at = smem_address(shared), kv_at = q_at + ROWS * STRIDE;
  for (int i = threadIdx.x; i < ROWS * CHUNKS; i += WARPS * 32) {
    const int r = i / CHUNKS, c = i - r * CHUNKS;
    const bool valid = tile.row + r < rows;
    const bf16* from = qkv + (u64)(row_begin + (valid ? tile.row + r : 0)) * q_stride + head * HEAD_DIM + c * 8;
    copy_async_16(q_at + r * STRIDE + c * 16, from, valid);
  }
  const int key_end = min(context, position0 + ROWS);
  const int key_begin = window > 0 ? max(0, position0 - window + 1) / KEY_TILE * KEY_TILE : 0;
  const u64 head_offset = (u64)kv_head * 16 * HEAD_DIM;
  const KeyTiles source = {key_cache + head_offset, value_cache + head_offset, block_table + (u64)tile.sequence * max_blocks,
                          (u64)kv_heads * 16 * HEAD_DIM, key_end};
  int key0 = (key_end - 1) / KEY_TILE * KEY_TILE, stage = 0;
  source.load(kv_at, kv_at + KEY_TILE * STRIDE, key0);
  copy_async_commit();

  // Addresses that ldmatrix wants from this lane: A and transposed B share a pattern, plain B has its own.
  const smem_t q_lane = q_at + (warp * 32 + (lane & 15)) * STRIDE + (lane >> 4) * 16;
  const u32 key_lane = ((lane & 7) + (lane >> 4) * 8) * STRIDE + ((lane >> 3) & 1) * 16;
  const u32 value_lane = (lane & 15) * STRIDE + (lane >> 4) * 16;

  float o[2][DIM_STEPS * 2][4], m[2][2], l[2][2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    m[i][0] = m[i][1] = minus_infinity(), l[i][0] = l[i][1] = 0.f;
#pragma unroll
    for (int d = 0; d < DIM_STEPS * 2; d++) o[i][d][0] = o[i][d][1] = o[i][d][2] = o[i][d][3] = 0.f;
  }
  const float factor = softcap > 0.f ? LOG2E : scale * LOG2E;  // raw product -> exponent of 2
  const int warp_first = position0 + warp * 32, lane_first = warp_first + (lane >> 2);

  for (; key0 >= key_begin; key0 -= KEY_TILE, stage ^= 1) {
    const smem_t keys = kv_at + stage * 2 * KEY_TILE * STRIDE, values = keys + KEY_TILE * STRIDE;
    copy_async_wait<0>();
    __syncthreads();
    if (key0 - KEY_TILE >= key_begin) {
      const smem_t next = kv_at + (stage ^ 1) * 2 * KEY_TILE * STRIDE;
      source.load(next, next + KEY_TILE * STRIDE, key0 - KEY_TILE);
    }
    copy_async_commit();
    if (key0 > warp_first + 31) continue;  // all of it in this warp's future

    float s[2][KEY_TILES][4];
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int n = 0; n < KEY_TILES; n++) s[i][n][0] = s[i][n][1] = s[i][n][2] = s[i][n][3] = 0.f;
#pragma unroll
    for (int k = 0; k < DIM_STEPS; k++) {
      u32 a[2][4];
      ldmatrix_x4(a[0], q_lane + k * 32);
      ldmatrix_x4(a[1], q_lane + 16 * STRIDE + k * 32);
#pragma unroll
      for (int n = 0; n < KEY_TILES; n += 2) {
        u32 b[4];
        ldmatrix_x4(b, keys + key_lane + n * 8 * STRIDE + k * 32);
#pragma unroll
        for (int i = 0; i < 2; i++) mma_bf16(s[i][n], a[i], b[0], b[1]), mma_bf16(s[i][n + 1], a[i], b[2], b[3]);
      }
    }
    if (softcap > 0.f) {
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
          for (int e = 0; e < 4; e++) s[i][n][e] = soft_cap(s[i][n][e] * scale, softcap);
    }
    if (key0 + KEY_TILE - 1 > warp_first || (window > 0 && key0 <= warp_first + 31 - window)) {
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
          for (int e = 0; e < 4; e++) {
            const int key = key0 + n * 8 + (lane & 3) * 2 + (e & 1), at = lane_first + i * 16 + (e >> 1) * 8;
            if (key > at || (window > 0 && key <= at - window)) s[i][n][e] = minus_infinity();
          }
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float most = m[i][half];
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++) most = fmaxf(most, fmaxf(s[i][n][half * 2], s[i][n][half * 2 + 1]));
        most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, 1));
        most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, 2));
        const float base = most == minus_infinity() ? 0.f : most * factor;  // nothing seen yet: exponents stay -inf
        const float alpha = exp2_fast(m[i][half] * factor - base);
        m[i][half] = most;
        float sum = 0.f;
#pragma unroll
        for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
          for (int e = half * 2; e < half * 2 + 2; e++) {
            s[i][n][e] = exp2_fast(s[i][n][e] * factor - base);
            sum += s[i][n][e];
          }
        l[i][half] = l[i][half] * alpha + sum;
#pragma unroll
        for (int d = 0; d < DIM_STEPS * 2; d++) o[i][d][half * 2] *= alpha, o[i][d][half * 2 + 1] *= alpha;
      }
#pragma unroll
    for (int k = 0; k < KEY_TILES / 2; k++) {
      u32 p[2][4];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        p[i][0] = pack_bf16(s[i][2 * k][0], s[i][2 * k][1]), p[i][1] = pack_bf16(s[i][2 * k][2], s[i][2 * k][3]);
        p[i][2] = pack_bf16(s[i][2 * k + 1][0], s[i][2 * k + 1][1]), p[i][3] = pack_bf16(s[i][2 * k + 1][2], s[i][2 * k + 1][3]);
      }
#pragma unroll
      for (int d = 0; d < DIM_STEPS; d++) {
        u32 b[4];
        ldmatrix_x4_trans(b, values + value_lane + k * 16 * STRIDE + d * 32);
#pragma unroll
        for (int i = 0; i < 2; i++)
          mma_bf16(o[i][2 * d], p[i], b[0], b[1]), mma_bf16(o[i][2 * d + 1], p[i], b[2], b[3]);
      }
    }
  }

  // Through the warp's own rows of the query tile, so that rows leave in 16-byte pieces.
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float sum = l[i][half];
      sum += __shfl_xor_sync(FULL_WARP, sum, 1);
      sum += __shfl_xor_sync(FULL_WARP, sum, 2);
      const float share = sum > 0.f ? 1.f / sum : 0.f;
      const smem_t to = q_at + (warp * 32 + i * 16 + half * 8 + (lane >> 2)) * STRIDE + (lane & 3) * 4;
#pragma unroll
      for (int d = 0; d < DIM_STEPS * 2; d++)
        store_shared4(to + d * 16, pack_bf16(o[i][d][half * 2] * share, o[i][d][half * 2 + 1] * share));
    }
  __syncwarp();
  for (int i = lane; i < 32 * CHUNKS; i += 32) {
    const int r = warp * 32 + i / CHUNKS, c = i % CHUNKS;
    if (tile.row + r < rows)
      *(u32x4*)(out + ((u64)(row_begin + tile.row + r) * heads + head) * HEAD_DIM + c * 8) = load_shared16(q_at + r * STRIDE + c * 16);
  }
}
#undef ROWS
#undef WARPS
#undef STRIDE
#undef CHUNKS
#undef KEY_TILES
#undef DIM_STEPS
