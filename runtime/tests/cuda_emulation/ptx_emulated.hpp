// The functions of runtime/src/cuda/kernels/ptx.cuh on the CPU.
#pragma once
#include "emulator.hpp"

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef u16 bf16;
typedef uintptr_t smem_t;
struct alignas(8) u32x2 { u32 r[2]; };
struct alignas(16) u32x4 { u32 r[4]; };

#define KERNEL inline
#define DEVICE inline
#define DEVICE_CALL inline
#define DYNAMIC_SHARED(name) u8* name = emu::shared_begin()
#define FULL_WARP 0xffffffffu
#define DEVICE_COUNTER inline u32

inline u32 bf16_bits(float f) {
  u32 u = __float_as_uint(f);
  if (f != f) return 0x7fff;
  return (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}
inline float bf16_value(u32 h) { return __uint_as_float(h << 16); }
inline u32 pack_bf16(float low, float high) { return bf16_bits(low) | (bf16_bits(high) << 16); }

template <class T> T load_as(const void* p) {
  if (uintptr_t(p) % sizeof(T)) emu::fail("misaligned load");
  T v;
  std::memcpy(&v, p, sizeof(T));
  return v;
}
inline u32x4 load_stream(const void* p) { return load_as<u32x4>(p); }
inline u32x2 load_stream8(const void* p) { return load_as<u32x2>(p); }
inline u32x4 load_weights(const void* p) { return load_as<u32x4>(p); }
inline u32 mul_bf16x2(u32 a, u32 b) {
  return pack_bf16(bf16_value(a & 0xffff) * bf16_value(b & 0xffff), bf16_value(a >> 16) * bf16_value(b >> 16));
}
inline float tanh_fast(float x) { return std::tanh(x); }
inline float exp2_fast(float x) { return std::exp2(x); }

// m16n8k16 by the fragment tables of the PTX ISA: lane = 4 * group + c holds A rows group and group + 8.
inline void mma_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  const u32 mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  auto* table = emu::show(mine, 6);
  const int group = emu::lane() >> 2, pair = emu::lane() & 3;
  for (int i = 0; i < 4; i++) {
    const int row = group + (i >> 1) * 8, column = pair * 2 + (i & 1);
    float sum = 0;
    for (int k = 0; k < 16; k++) {
      const u32 av = table[(row & 7) * 4 + ((k & 7) >> 1)][(row >> 3) + (k >> 3) * 2];
      const u32 bv = table[column * 4 + ((k & 7) >> 1)][4 + (k >> 3)];
      sum += bf16_value((k & 1) ? av >> 16 : av & 0xffff) * bf16_value((k & 1) ? bv >> 16 : bv & 0xffff);
    }
    c[i] += sum;
  }
}
inline void mma_bf16_top(float (&c)[2], u32 a0, u32 a2, u32 b0, u32 b1) {
  float all[4] = {c[0], c[1], 0, 0};
  const u32 a[4] = {a0, 0, a2, 0};
  mma_bf16(all, a, b0, b1);
  c[0] = all[0], c[1] = all[1];
}

inline smem_t smem_address(const void* p) { return smem_t(p); }
inline void check_shared(smem_t at, size_t bytes) {
  const smem_t begin = smem_t(emu::shared.data());
  if (at % bytes || at < begin || at + bytes > begin + emu::shared.size()) emu::fail("shared memory: outside or misaligned");
}
// Lane i's address is row i % 8 of matrix i / 8; a lane receives elements 2 (lane % 4), +1 of row lane / 4 of each.
inline void ldmatrix(u32 (&r)[4], smem_t at, bool transposed) {
  check_shared(at, 16);
  const u32 mine[2] = {u32(at), u32(uint64_t(at) >> 32)};
  auto* table = emu::show(mine, 2);
  const auto element = [&](int matrix, int row, int column) {
    const u32* w = table[matrix * 8 + row];
    return ((const u16*)(smem_t(w[0]) | (smem_t(w[1]) << 32)))[column];
  };
  const int row = emu::lane() >> 2, column = (emu::lane() & 3) * 2;
  for (int m = 0; m < 4; m++)
    r[m] = transposed ? element(m, column, row) | u32(element(m, column + 1, row)) << 16
                      : element(m, row, column) | u32(element(m, row, column + 1)) << 16;
  __syncwarp();  // nobody overwrites the rows while others still read them
}
inline void ldmatrix_x4(u32 (&r)[4], smem_t at) { ldmatrix(r, at, false); }
inline void ldmatrix_x4_trans(u32 (&r)[4], smem_t at) { ldmatrix(r, at, true); }
inline void store_shared4(smem_t at, u32 v) { check_shared(at, 4); std::memcpy((void*)at, &v, 4); }
inline void store_shared16(smem_t at, const u32x4& v) { check_shared(at, 16); std::memcpy((void*)at, &v, 16); }
inline u32x4 load_shared16(smem_t at) { check_shared(at, 16); return load_as<u32x4>((const void*)at); }
inline u32x2 load_shared8(smem_t at) { check_shared(at, 8); return load_as<u32x2>((const void*)at); }
inline u32 load_shared4(smem_t at) { check_shared(at, 4); return load_as<u32>((const void*)at); }

inline void copy_async_16(smem_t to, const void* from, bool valid) {
  check_shared(to, 16);
  if (valid && uintptr_t(from) % 16) emu::fail("misaligned asynchronous copy");
  emu::fibers[emu::current].groups.back().push_back({to, from, valid});
}
inline void copy_async_commit() { emu::fibers[emu::current].groups.emplace_back(); }
template <int PENDING> inline void copy_async_wait() {
  auto& groups = emu::fibers[emu::current].groups;
  while (groups.size() > PENDING + 1) {
    for (const auto& c : groups.front()) emu::land(c);
    groups.erase(groups.begin());
  }
}
inline void wait_for_previous_kernels() {}
inline void let_next_kernel_start() {}

inline int cluster_size() { return emu::cluster; }
inline int cluster_rank() { return emu::fibers[emu::current].rank; }
inline void cluster_arrive() {
  auto& b = emu::cluster_barrier;
  emu::fibers[emu::current].cluster_generation = b.generation;
  if (++b.arrived == emu::block.x * emu::cluster) b.arrived = 0, b.generation++;
}
inline void cluster_wait() {
  while (emu::cluster_barrier.generation == emu::fibers[emu::current].cluster_generation) emu::yield();
}
inline void store_in_cluster(smem_t at, int rank, float v) {
  const smem_t there = at + (rank - cluster_rank()) * emu::shared_of_block;
  check_shared(there, 4);
  std::memcpy((void*)there, &v, 4);
}
inline void store_in_cluster4(smem_t at, int rank, float a, float b, float c, float d) {
  if (at % 16) emu::fail("shared memory: misaligned");
  store_in_cluster(at, rank, a), store_in_cluster(at + 4, rank, b), store_in_cluster(at + 8, rank, c), store_in_cluster(at + 12, rank, d);
}
