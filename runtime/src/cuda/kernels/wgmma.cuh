// Hopper's warpgroup products (sm_90a only), in the manner of ptx.cuh: four warps together, d (64 x n, f32, in registers)
// += a b, with b, and a or not, in shared memory behind a descriptor. Asynchronous: fence, products, commit, wait.

typedef u64 tile_t;  // descriptor of a tile in shared memory

// Rows of 128 bytes with the 128-byte swizzle: 16-byte piece c of row r lies at piece c ^ (r % 8). `groups` is the distance
// in bytes of 8 rows from the next 8, `panels` that of 64 columns from the next 64 (only where columns are the long way).
DEVICE tile_t swizzled_tile(smem_t at, u32 groups, u32 panels) {
  return (u64)((at & 0x3ffff) >> 4) | (u64)(panels >> 4) << 16 | (u64)(groups >> 4) << 32 | 1ull << 62;
}
// The same, of which the compiler knows nothing: what is added to it is then added in the registers that products read, not
// worked out anew for each product, which would wait for the one before.
DEVICE tile_t base_tile(smem_t at, u32 groups, u32 panels) {
  tile_t tile = swizzled_tile(at, groups, panels);
  asm volatile("" : "+l"(tile));
  return tile;
}
// The tile `bytes` further on.
DEVICE tile_t moved_tile(tile_t tile, u32 bytes) { return tile + (bytes >> 4); }
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }
// The compiler does not know that a product runs on: nothing of d moves across this. After a wait, and before a fence.
template <int T> DEVICE void wgmma_settle(float (&d)[T][4]) {
#pragma unroll
  for (int i = 0; i < T; i++) asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])::"memory");
}
// The same value, but nothing that follows from it is computed before this: where registers are short.
DEVICE int anew(int v) {
  asm volatile("" : "+r"(v));
  return v;
}
// What this thread wrote to shared memory (cp.async too, once waited for) is there for the products after the next barrier.
DEVICE void publish_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Barriers in shared memory on which some threads wait for others, or for their asynchronous copies. A phase ends when
// `count` have arrived; the phases of a barrier have parities 0, 1, 0 ...
DEVICE void barrier_init(smem_t at, u32 count) { asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(at), "r"(count) : "memory"); }
DEVICE void barrier_arrive(smem_t at) { asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(at) : "memory"); }
// Arrives when all copies that this thread has begun so far have landed.
DEVICE void barrier_arrive_after_copies(smem_t at) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(at) : "memory");
}
// Arrives, and the phase ends only when `bytes` of copies that name the barrier have landed too.
DEVICE void barrier_arrive_expect(smem_t at, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}
// Arrives at the barrier of block `rank` of the cluster that is in the place of `at` here.
DEVICE void barrier_arrive_in(smem_t at, int rank) {
  asm volatile("{\n.reg .u32 there;\nmapa.shared::cluster.u32 there, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [there];\n}\n"
               ::"r"(at), "r"(rank) : "memory");
}
// The same, where what this thread wrote into the cluster's memory is seen by who waits in the same manner.
DEVICE void barrier_arrive_in_cluster(smem_t at, int rank) {
  asm volatile("{\n.reg .u32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
               "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}\n" ::"r"(at), "r"(rank) : "memory");
}
// Makes the initialised barriers known to the other blocks of the cluster and to the copy engine; a cluster barrier follows.
DEVICE void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// A matrix in global memory, as cuTensorMapEncodeTiled describes it: rows of bf16, boxes of rows of 64, 128-byte swizzle.
struct __align__(128) TensorMap { u64 words[16]; };
// To be called before the first copy: the host wrote the map.
DEVICE void acquire_map(const TensorMap* map) {
  asm volatile("fence.proxy.tensormap::generic.acquire.sys [%0], 128;" ::"l"(map) : "memory");
}
DEVICE void prefetch_map(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
// The box at `column` and `row` to shared memory, 128 bytes a row, by the copy engine; the barrier hears of it.
DEVICE void copy_box(smem_t to, const TensorMap* map, int column, int row, smem_t barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
               ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier) : "memory");
}
// The same to the same place in every block of the cluster whose bit is set; in each the barrier in this place hears of it.
DEVICE void copy_box_to_all(smem_t to, const TensorMap* map, int column, int row, smem_t barrier, u32 blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;"
      ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier), "h"((u16)blocks) : "memory");
}
// Four 8 x 8 matrices as ldmatrix_x4 gives them, to shared memory.
DEVICE void stmatrix_x4(smem_t at, const u32 (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}
// Until the phase of this parity has ended; at once when the barrier is still in the phase before it.
DEVICE void barrier_wait(smem_t at, u32 parity) {
  u32 done = 0;
#ifdef SPIN_LIMIT  // of kernel_check: a barrier that is never reached ends the kernel instead of hanging the card
  for (u32 spins = 0; !done; spins++) {
    if (spins == SPIN_LIMIT) asm volatile("trap;");
#else
  while (!done) {
#endif
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(done) : "r"(at), "r"(parity) : "memory");
  }
}
// 16 bytes to the place in block `rank` that `to` is in this one; the barrier there in the place of `barrier` hears of them.
DEVICE void send_in_cluster4(smem_t to, int rank, smem_t barrier, float a, float b, float c, float d) {
  asm volatile(
      "{\n.reg .u32 there, hears;\nmapa.shared::cluster.u32 there, %0, %1;\nmapa.shared::cluster.u32 hears, %2, %1;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%3, %4, %5, %6}, [hears];\n}\n"
      ::"r"(to), "r"(rank), "r"(barrier), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}
DEVICE void barrier_wait_in_cluster(smem_t at, u32 parity) {
  u32 done = 0;
  while (!done)
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(done) : "r"(at), "r"(parity) : "memory");
}

// Blocks of a whole grid wait for one another by a count in global memory. The threads of a block meet, then one counts up.
DEVICE void count_up(u64* count) { asm volatile("red.release.gpu.global.add.u64 [%0], 1;" ::"l"(count) : "memory"); }
DEVICE u64 count_now(const u64* count) {
  u64 n;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(n) : "l"(count) : "memory");
  return n;
}
// Until the count is `until`: what was written before is then there for this thread, its copies, and who it tells.
DEVICE void wait_for_count(const u64* count, u64 until) {
#ifdef SPIN_LIMIT
  for (u32 spins = 0; count_now(count) < until; spins++)
    if (spins == SPIN_LIMIT) asm volatile("trap;");
#else
  while (count_now(count) < until) {}
#endif
  asm volatile("fence.proxy.async.global;" ::: "memory");
}
// What other blocks of the same launch wrote: past L1, which may hold what was there before.
DEVICE float4 load_fresh16(const float* p) {
  float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
  return v;
}
DEVICE u32 load_fresh4(const void* p) {
  u32 v;
  asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
DEVICE u32x2 load_fresh8(const void* p) {
  u32x2 v;
  asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];" : "=r"(v.r[0]), "=r"(v.r[1]) : "l"(p) : "memory");
  return v;
}
// Barrier `id` (1 .. 15; 0 is __syncthreads) of `threads` threads.
DEVICE void named_wait(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
// Registers a thread, for all warps of a warpgroup: what some give back, others take.
template <int N> DEVICE void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> DEVICE void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }

// Products of 16 of k. Accumulators by 16 columns: operands %0 .. of the instruction, and their names in it.
#define TILE_OF(t) "+f"(d[t][0]), "+f"(d[t][1]), "+f"(d[t][2]), "+f"(d[t][3])
#define TILES_2(t) TILE_OF(t), TILE_OF(t + 1)
#define TILES_4(t) TILES_2(t), TILES_2(t + 2)
#define TILES_8(t) TILES_4(t), TILES_4(t + 4)
#define NAMES_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_1 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_1A "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define NAMES_2 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define NAMES_2A "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define NAMES_3 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define NAMES_3A "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"

// a: 64 rows of 16 in shared memory; b: COLUMNS rows of 16, both along the long way of their rows. A, B, ADD: the names of
// what follows the accumulators.
#define WGMMA_SHARED(COLUMNS, NAMES, A, B, ADD, ...)                                                                      \
  DEVICE void wgmma_shared(float (&d)[COLUMNS / 8][4], tile_t a, tile_t b, int add) {                                      \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADD ", 0;\n"                                                         \
                 "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32.bf16.bf16 {" NAMES "}, " A ", " B                   \
                 ", p, 1, 1, 0, 0;\n}\n"                                                                                   \
                 : __VA_ARGS__ : "l"(a), "l"(b), "r"(add));                                                               \
  }
WGMMA_SHARED(64, NAMES_0, "%32", "%33", "%34", TILES_8(0))
WGMMA_SHARED(96, NAMES_0 ", " NAMES_1A, "%48", "%49", "%50", TILES_8(0), TILES_4(8))
WGMMA_SHARED(128, NAMES_0 ", " NAMES_1, "%64", "%65", "%66", TILES_8(0), TILES_8(8))
WGMMA_SHARED(160, NAMES_0 ", " NAMES_1 ", " NAMES_2A, "%80", "%81", "%82", TILES_8(0), TILES_8(8), TILES_4(16))
WGMMA_SHARED(192, NAMES_0 ", " NAMES_1 ", " NAMES_2, "%96", "%97", "%98", TILES_8(0), TILES_8(8), TILES_8(16))
WGMMA_SHARED(224, NAMES_0 ", " NAMES_1 ", " NAMES_2 ", " NAMES_3A, "%112", "%113", "%114", TILES_8(0), TILES_8(8), TILES_8(16),
             TILES_4(24))
WGMMA_SHARED(256, NAMES_0 ", " NAMES_1 ", " NAMES_2 ", " NAMES_3, "%128", "%129", "%130", TILES_8(0), TILES_8(8), TILES_8(16),
             TILES_8(24))

// a: fragments in registers as of mma_bf16; b: 16 rows of COLUMNS, used across its rows (transposed).
#define WGMMA_REGISTERS(COLUMNS, NAMES, A, B, ...)                                                                        \
  DEVICE void wgmma_registers(float (&d)[COLUMNS / 8][4], const u32 (&a)[4], tile_t b) {                                   \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"                                                               \
                 "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32.bf16.bf16 {" NAMES "}, {" A "}, " B                 \
                 ", p, 1, 1, 1;\n}\n"                                                                                      \
                 : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                     \
  }
WGMMA_REGISTERS(64, NAMES_0, "%32, %33, %34, %35", "%36", TILES_8(0))
WGMMA_REGISTERS(128, NAMES_0 ", " NAMES_1, "%64, %65, %66, %67", "%68", TILES_8(0), TILES_8(8))
