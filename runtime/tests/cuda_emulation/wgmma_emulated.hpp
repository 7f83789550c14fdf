// The functions of wgmma.cuh on the CPU: each warp its 16 rows, at once. That a product runs on while the program does is
// not imitated.
#pragma once
#include "ptx_emulated.hpp"

struct tile_t { smem_t at; u32 groups, panels; };
inline tile_t swizzled_tile(smem_t at, u32 groups, u32 panels) { return {at, groups, panels}; }
inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <size_t T> inline void wgmma_settle(float (&)[T][4]) {}
template <int PENDING> inline void wgmma_wait() { __syncwarp(); }
inline void publish_shared() {}

inline float swizzled_element(smem_t linear) {
  const smem_t at = linear ^ ((linear >> 7 & 7) << 4);
  check_shared(at, 2);
  return bf16_value(*(const u16*)at);
}
// Element (row, k) of a tile whose rows run along k; element (k, column) of one whose rows run along the columns.
inline float along(const tile_t& t, int row, int k) { return swizzled_element(t.at + row / 8 * t.groups + row % 8 * 128 + k * 2); }
inline float across(const tile_t& t, int k, int column) {
  return swizzled_element(t.at + column / 64 * t.panels + k / 8 * t.groups + k % 8 * 128 + column % 64 * 2);
}

template <size_t T> void wgmma_shared(float (&d)[T][4], const tile_t& a, const tile_t& b, int add) {
  const int lane = emu::lane(), row0 = (threadIdx.x >> 5 & 3) * 16 + (lane >> 2);
  for (size_t n = 0; n < T; n++)
    for (int e = 0; e < 4; e++) {
      float sum = add ? d[n][e] : 0;
      for (int k = 0; k < 16; k++) sum += along(a, row0 + (e >> 1) * 8, k) * along(b, int(n) * 8 + (lane & 3) * 2 + (e & 1), k);
      d[n][e] = sum;
    }
}
template <size_t T> void wgmma_registers(float (&d)[T][4], const u32 (&a)[4], const tile_t& b) {
  auto* table = emu::show(a, 4);
  const int lane = emu::lane(), group = lane >> 2;
  for (size_t n = 0; n < T; n++)
    for (int e = 0; e < 4; e++)
      for (int k = 0; k < 16; k++) {
        const u32 pair = table[group * 4 + ((k & 7) >> 1)][(e >> 1) + (k >> 3) * 2];
        d[n][e] += bf16_value((k & 1) ? pair >> 16 : pair & 0xffff) * across(b, k, int(n) * 8 + (lane & 3) * 2 + (e & 1));
      }
}
