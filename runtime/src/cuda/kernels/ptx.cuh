// The machine's own instructions, one small function each, and nothing else: kernels contain no assembly. The CPU
// emulation (runtime/tests/cuda_emulation) replaces this file by functions of the same names.
// Header-free: NVRTC compiles it without an include path.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef u16 bf16;  // bits of a bfloat16
typedef u32 smem_t;  // address in shared memory

struct __align__(8) u32x2 { u32 r[2]; };
struct __align__(16) u32x4 { u32 r[4]; };

#define KERNEL extern "C" __global__
#define DEVICE __device__ __forceinline__
#define DEVICE_CALL __device__ __noinline__
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) u8 name[]
#define FULL_WARP 0xffffffffu
#define DEVICE_COUNTER __device__ u32  // zero when the kernel is loaded

// Two floats to packed bf16, round to nearest even; the first is in the low half.
DEVICE u32 pack_bf16(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

// 16 or 8 bytes that are read once: they do not displace what L1 holds. Coherent (no .nc): under programmatic
// dependent launch the kernel before may still be writing when this one starts.
DEVICE u32x4 load_stream(const void* p) {
  u32x4 v;
  asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.r[0]), "=r"(v.r[1]), "=r"(v.r[2]), "=r"(v.r[3]) : "l"(p));
  return v;
}
DEVICE u32x2 load_stream8(const void* p) {
  u32x2 v;
  asm volatile("ld.global.L1::no_allocate.L2::128B.v2.u32 {%0,%1}, [%2];" : "=r"(v.r[0]), "=r"(v.r[1]) : "l"(p));
  return v;
}
// 16 bytes of weights: never written while kernels run, so the read-only path and any time are right.
DEVICE u32x4 load_weights(const void* p) {
  u32x4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.r[0]), "=r"(v.r[1]), "=r"(v.r[2]), "=r"(v.r[3]) : "l"(p));
  return v;
}

// Two products of bf16, each rounded once.
DEVICE u32 mul_bf16x2(u32 a, u32 b) {
  u32 r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(0x80008000u));
  return r;
}

DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DEVICE float tanh_fast(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// c += a b: a is 16x16 (row), b is 16x8 (column), bf16; c is 16x8 f32. Fragments as in the PTX ISA (mma.m16n8k16).
DEVICE void mma_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The same with rows 8..15 of a zero: c[2] and c[3] would stay zero and take no registers.
DEVICE void mma_bf16_top(float (&c)[2], u32 a0, u32 a2, u32 b0, u32 b1) {
  [[maybe_unused]] float z2, z3;
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%6,%5,%6},{%7,%8},{%0,%1,%9,%9};"
      : "+f"(c[0]), "+f"(c[1]), "=f"(z2), "=f"(z3) : "r"(a0), "r"(a2), "r"(0), "r"(b0), "r"(b1), "f"(0.f));
}

DEVICE smem_t smem_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEVICE void ldmatrix_x4(u32 (&r)[4], smem_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at));
}
DEVICE void ldmatrix_x4_trans(u32 (&r)[4], smem_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at));
}
DEVICE void store_shared4(smem_t at, u32 v) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(v) : "memory"); }
DEVICE void store_shared16(smem_t at, const u32x4& v) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(v.r[0]), "r"(v.r[1]), "r"(v.r[2]), "r"(v.r[3]) : "memory");
}
DEVICE u32x4 load_shared16(smem_t at) {
  u32x4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.r[0]), "=r"(v.r[1]), "=r"(v.r[2]), "=r"(v.r[3]) : "r"(at) : "memory");
  return v;
}
DEVICE u32x2 load_shared8(smem_t at) {
  u32x2 v;
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.r[0]), "=r"(v.r[1]) : "r"(at) : "memory");
  return v;
}
DEVICE u32 load_shared4(smem_t at) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
  return v;
}

// 16 bytes global -> shared in the background; zeros when `valid` is false (`from` is then not read).
DEVICE void copy_async_16(smem_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
               ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most PENDING of this thread's groups are under way.
template <int PENDING> DEVICE void copy_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

// Programmatic dependent launch: a kernel may start while the one before it still runs. Nothing that a kernel before
// wrote or reads may be touched above the wait; both are no-ops when launched plainly or below sm_90.
DEVICE void wait_for_previous_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Clusters: blocks that run together and reach one another's shared memory. One block below sm_90.
DEVICE int cluster_size() {
  u32 n = 1;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
#endif
  return (int)n;
}
DEVICE int cluster_rank() {
  u32 r = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
#endif
  return (int)r;
}
// Every thread of every block of the cluster arrives once, then waits; what was written before arriving is seen after.
DEVICE void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
DEVICE void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// To the place in block `rank` that `at` is in this one.
DEVICE void store_in_cluster(smem_t at, int rank, float v) {
#if __CUDA_ARCH__ >= 900
  asm volatile("{ .reg .u32 there; mapa.shared::cluster.u32 there, %0, %1; st.shared::cluster.f32 [there], %2; }"
               ::"r"(at), "r"(rank), "f"(v) : "memory");
#endif
}
DEVICE void store_in_cluster4(smem_t at, int rank, float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 900
  asm volatile("{ .reg .u32 there; mapa.shared::cluster.u32 there, %0, %1; st.shared::cluster.v4.f32 [there], {%2, %3, %4, %5}; }"
               ::"r"(at), "r"(rank), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
#endif
}
