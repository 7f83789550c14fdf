// Runs the kernels' own source on the CPU: every CUDA thread is a fiber of one OS thread, warps meet at shuffles, mma and
// ldmatrix, blocks at __syncthreads, asynchronous copies land only when they are waited for. No timing, no races between
// memory operations; indexing, masking, barriers that are missing or not reached by all, and arithmetic are what it finds.
#pragma once
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

struct dim3 { int x = 1, y = 1, z = 1; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }

namespace emu {

struct Copy { uintptr_t to; const void* from; bool valid; };

struct Fiber {
  jmp_buf at;
  ucontext_t start;
  std::unique_ptr<char[]> stack;
  dim3 thread, block;
  int rank = 0;  // of the block in its cluster
  bool done = false;
  unsigned cluster_generation = 0;
  std::vector<std::vector<Copy>> groups{1};  // the last is not committed yet
};

struct Barrier { int arrived = 0; unsigned generation = 0; };

// What the lanes of a warp show one another; two, so that a quick lane may enter the next meeting.
struct Warp {
  Barrier barrier;
  uint32_t shown[2][32][8];
  const void* pointers[2][32];
  unsigned meetings[32] = {};
};

inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline std::vector<Barrier> block_barriers;
inline Barrier cluster_barrier;
inline int cluster = 1;
inline size_t shared_of_block;  // bytes from one block's to the next one's
inline Barrier named_barriers[8][16];  // of each block of a cluster
inline std::vector<std::function<void()>> landings;  // of copies that a barrier hears of
inline int current, alive;
inline jmp_buf scheduler;
inline dim3 grid, block;
inline std::vector<unsigned char> shared;
inline std::function<void()> body;
inline std::mt19937 order{1};

[[noreturn]] inline void fail(const char* what) {
  const dim3 b = fibers[current].block;
  std::printf("FAILED: %s (block %d %d %d thread %d)\n", what, b.x, b.y, b.z, fibers[current].thread.x);
  std::fflush(stdout);
  std::_Exit(1);
}

inline void yield() {
  if (_setjmp(fibers[current].at) == 0) _longjmp(scheduler, 1);
}
inline void arrive(Barrier& barrier, int expected) {
  if (++barrier.arrived == expected) barrier.arrived = 0, barrier.generation++;
}
inline void meet(Barrier& barrier, int expected) {
  const unsigned generation = barrier.generation;
  arrive(barrier, expected);
  while (barrier.generation == generation) yield();
}
inline void land(const Copy& copy) {
  if (copy.valid) std::memcpy((void*)copy.to, copy.from, 16);
  else std::memset((void*)copy.to, 0, 16);
}
inline int lane() { return fibers[current].thread.x & 31; }
inline Warp& warp() { return warps[fibers[current].rank * ((block.x + 31) / 32) + (fibers[current].thread.x >> 5)]; }
inline unsigned char* shared_begin() {
  return (unsigned char*)((uintptr_t(shared.data()) + 1023) / 1024 * 1024) + fibers[current].rank * shared_of_block;
}
// Every lane shows `n` words; returns the table of all lanes.
inline uint32_t (*show(const uint32_t* words, int n))[8] {
  Warp& w = warp();
  auto* table = w.shown[w.meetings[lane()]++ & 1];
  std::memcpy(table[lane()], words, n * 4);
  meet(w.barrier, 32);
  return table;
}

inline void entry() {
  body();
  fibers[current].done = true;
  alive--;
  _longjmp(scheduler, 1);
}

// The blocks of a cluster together; without clusters, one block.
inline void run_cluster(dim3 first, int threads_of_block) {
  constexpr size_t STACK = 64 << 10;
  const int threads = threads_of_block * cluster;
  if (fibers.size() != size_t(threads)) {
    fibers.clear();
    fibers.resize(threads);
    for (auto& f : fibers) f.stack = std::make_unique<char[]>(STACK);
  }
  warps.assign((threads + 31) / 32, Warp());
  block_barriers.assign(cluster, {});
  cluster_barrier = {};
  for (auto& of_block : named_barriers)
    for (Barrier& b : of_block) b = {};
  std::fill(shared.begin(), shared.end(), 0xff);  // NaN
  alive = threads;
  std::vector<int> turn(threads);
  for (int i = 0; i < threads; i++) {
    turn[i] = i;
    Fiber& f = fibers[i];
    f.thread = {i % threads_of_block, 0, 0};
    f.rank = i / threads_of_block;
    f.block = {first.x, first.y + f.rank, first.z};
    f.done = false;
    f.groups.assign(1, {});
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = f.stack.get();
    f.start.uc_stack.ss_size = STACK;
    f.start.uc_link = nullptr;
    makecontext(&f.start, entry, 0);
  }
  // Warps in random order, so that no kernel lives by the order of a loop.
  for (int i = threads / 32 - 1; i > 0; i--) {
    const int other = order() % (i + 1);
    for (int l = 0; l < 32; l++) std::swap(turn[i * 32 + l], turn[other * 32 + l]);
  }
  std::vector<char> begun(threads, 0);
  int idle_rounds = 0, last_alive = alive;
  while (alive > 0) {
    for (size_t i = 0; i < landings.size(); i++)
      if (order() % 3 == 0) {
        landings[i]();
        landings.erase(landings.begin() + i--);
      }
    for (int t : turn) {
      if (fibers[t].done) continue;
      current = t;
      if (_setjmp(scheduler) == 0) {
        if (begun[t]) _longjmp(fibers[t].at, 1);
        begun[t] = 1;
        setcontext(&fibers[t].start);
      }
    }
    // Those that are left wait for one another or for threads that have ended: a barrier not reached by all.
    if (alive == last_alive && ++idle_rounds > 100000) fail("deadlock: a barrier that not all threads reach");
    if (alive != last_alive) idle_rounds = 0, last_alive = alive;
  }
  if (!landings.empty()) fail("a thread ended with copies under way");
}

// `clusters`: blocks of a cluster, which lie along y.
inline void launch(dim3 g, int threads, size_t dynamic_shared, std::function<void()> f, int clusters = 1) {
  grid = g, block = {threads, 1, 1}, body = std::move(f), cluster = clusters;
  shared_of_block = (dynamic_shared + 1023) / 1024 * 1024;
  shared.assign(shared_of_block * clusters + 1024, 0xff);
  for (int z = 0; z < g.z; z++)
    for (int y = 0; y < g.y; y += clusters)
      for (int x = 0; x < g.x; x++) run_cluster({x, y, z}, threads);
}

}  // namespace emu

#define threadIdx (emu::fibers[emu::current].thread)
#define blockIdx (emu::fibers[emu::current].block)
#define gridDim emu::grid
#define blockDim emu::block
#define __device__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) alignas(n)

inline void __syncthreads() { emu::meet(emu::block_barriers[emu::fibers[emu::current].rank], emu::block.x); }
inline float __fdividef(float a, float b) { return a / b; }
inline void __threadfence() {}
inline void __syncwarp() { uint32_t none = 0; emu::show(&none, 1); }
template <class T> T shuffle(T v, int from) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  uint32_t words[2] = {};
  std::memcpy(words, &v, sizeof(T));
  auto* table = emu::show(words, 2);
  if (from >= 0 && from < 32) std::memcpy(&v, table[from], sizeof(T));
  return v;
}
template <class T> T __shfl_xor_sync(unsigned, T v, int mask) { return shuffle(v, emu::lane() ^ mask); }
template <class T> T __shfl_up_sync(unsigned, T v, int by) { return shuffle(v, emu::lane() - by < 0 ? emu::lane() : emu::lane() - by); }
template <class T> T __shfl_sync(unsigned, T v, int from) { return shuffle(v, from & 31); }
inline uint32_t __ballot_sync(unsigned, bool v) {
  const uint32_t word = v;
  auto* table = emu::show(&word, 1);
  uint32_t bits = 0;
  for (int i = 0; i < 32; i++) bits |= table[i][0] << i;
  return bits;
}
inline int __ffs(uint32_t v) { return __builtin_ffs(int(v)); }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = (uint64_t(b) << 32) | a;
  uint32_t r = 0;
  for (int i = 0; i < 4; i++) r |= uint32_t((both >> (8 * ((selector >> (4 * i)) & 7))) & 255) << (8 * i);
  return r;
}
inline float __uint_as_float(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
inline uint32_t __float_as_uint(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
// One fiber runs at a time and never stops inside these.
template <class T> T atomicAdd(T* at, T v) { T was = *at; *at += v; return was; }
template <class T> T atomicMax(T* at, T v) { T was = *at; *at = std::max(was, v); return was; }
template <class T> T atomicCAS(T* at, T compare, T v) { T was = *at; if (was == compare) *at = v; return was; }
using std::max;
using std::min;
