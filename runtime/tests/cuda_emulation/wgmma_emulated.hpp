// The functions of wgmma.cuh on the CPU: each warp its 16 rows, at once. That a product runs on while the program does is
// not imitated.
#pragma once
#include "ptx_emulated.hpp"

struct tile_t { smem_t at; u32 groups, panels; };
inline tile_t swizzled_tile(smem_t at, u32 groups, u32 panels) { return {at, groups, panels}; }
inline tile_t base_tile(smem_t at, u32 groups, u32 panels) { return {at, groups, panels}; }
inline tile_t moved_tile(tile_t tile, u32 bytes) { return {tile.at + bytes, tile.groups, tile.panels}; }
inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <size_t T> inline void wgmma_settle(float (&)[T][4]) {}
inline int anew(int v) { return v; }
template <int PENDING> inline void wgmma_wait() { __syncwarp(); }
inline void publish_shared() {}

// A barrier in shared memory: who is still to arrive, of how many, and the phases that have ended.
struct SharedBarrier { u8 pending, count; u16 phases; int bytes; };
inline SharedBarrier& shared_barrier(smem_t at) { return *(SharedBarrier*)at; }
inline void barrier_init(smem_t at, u32 count) { shared_barrier(at) = {u8(count), u8(count), 0, 0}; }
inline void barrier_settle(SharedBarrier& b) {
  if (b.pending == 0 && b.bytes == 0) b.pending = b.count, b.phases++;
}
inline void barrier_arrive(smem_t at) {
  SharedBarrier& b = shared_barrier(at);
  if (b.pending-- == 0) emu::fail("more arrivals at a barrier than it counts");
  barrier_settle(b);
}
inline void barrier_arrive_expect(smem_t at, u32 bytes) {
  shared_barrier(at).bytes += int(bytes);
  barrier_arrive(at);
}
inline void publish_barriers() {}
// The same place in block `rank` of the cluster.
inline smem_t in_block(smem_t at, int rank) { return at + (rank - cluster_rank()) * emu::shared_of_block; }
inline void barrier_arrive_in(smem_t at, int rank) { barrier_arrive(in_block(at, rank)); }
inline void barrier_arrive_in_cluster(smem_t at, int rank) { barrier_arrive_in(at, rank); }
struct TensorMap { const bf16* base; int width, rows = 1 << 30, box_rows = 16; };
inline void acquire_map(const TensorMap*) {}
inline void prefetch_map(const TensorMap*) {}
inline void copy_box(smem_t to, const TensorMap* map, int column, int row, smem_t barrier) {
  if (to % 1024) emu::fail("a box of 8 rows begins at 1,024 bytes");
  check_shared(to, 16), check_shared(to + map->box_rows * 128 - 16, 16);
  const TensorMap m = *map;
  emu::landings.push_back([=] {
    for (int r = 0; r < m.box_rows; r++)
      for (int c = 0; c < 8; c++) {
        void* at = (void*)(to + r * 128 + (c ^ (r & 7)) * 16);
        if (row + r < m.rows && column + c * 8 < m.width) std::memcpy(at, m.base + size_t(row + r) * m.width + column + c * 8, 16);
        else std::memset(at, 0, 16);
      }
    shared_barrier(barrier).bytes -= m.box_rows * 128;
    barrier_settle(shared_barrier(barrier));
  });
}
inline void copy_box_to_all(smem_t to, const TensorMap* map, int column, int row, smem_t barrier, u32 blocks) {
  for (int rank = 0; rank < emu::cluster; rank++)
    if (blocks >> rank & 1) copy_box(in_block(to, rank), map, column, row, in_block(barrier, rank));
}
// As ldmatrix_x4 the other way: lane i has the address of row i % 8 of matrix i / 8.
inline void stmatrix_x4(smem_t at, const u32 (&r)[4]) {
  check_shared(at, 16);
  u32 mine[6] = {r[0], r[1], r[2], r[3], u32(at), u32(uint64_t(at) >> 32)};
  auto* table = emu::show(mine, 6);
  const int lane = emu::lane(), matrix = lane >> 3, row = lane & 7;
  for (int c = 0; c < 4; c++) std::memcpy((void*)(at + c * 4), &table[row * 4 + c][matrix], 4);
  __syncwarp();
}
// The copies land, and the barrier hears of it, at some later time.
inline void barrier_arrive_after_copies(smem_t at) {
  auto& groups = emu::fibers[emu::current].groups;
  std::vector<emu::Copy> copies;
  for (auto& g : groups) copies.insert(copies.end(), g.begin(), g.end());
  groups.assign(1, {});
  emu::landings.push_back([copies, at] {
    for (const auto& c : copies) emu::land(c);
    barrier_arrive(at);
  });
}
inline void barrier_wait(smem_t at, u32 parity) {
  while ((shared_barrier(at).phases & 1) == parity) emu::yield();
}
inline void send_in_cluster4(smem_t to, int rank, smem_t barrier, float a, float b, float c, float d) {
  store_in_cluster4(to, rank, a, b, c, d);
  SharedBarrier& there = shared_barrier(in_block(barrier, rank));
  there.bytes -= 16;
  barrier_settle(there);
}
inline void barrier_wait_in_cluster(smem_t at, u32 parity) { barrier_wait(at, parity); }
inline void count_up(u64* count) { ++*count; }
inline u64 count_now(const u64* count) { return *count; }
inline void wait_for_count(const u64* count, u64 until) {
  while (*count < until) emu::yield();
}
inline float4 load_fresh16(const float* p) { return load_as<float4>(p); }
inline u32 load_fresh4(const void* p) { return load_as<u32>(p); }
inline u32x2 load_fresh8(const void* p) { return load_as<u32x2>(p); }
inline void named_wait(int id, int threads) { emu::meet(emu::named_barriers[cluster_rank()][id], threads); }
template <int N> inline void fewer_registers() {}
template <int N> inline void more_registers() {}

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
