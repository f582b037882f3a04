// Products of a warpgroup: d [64 x N] += a [64 x 16] b [16 x N], f32 accumulators.
//
// Accumulator i of a thread: row 16 (warp % 4) + lane / 4 + 8 (i / 2 % 2), column 8 (i / 4) +
// 2 (lane % 4) + i % 2: that of mma.sync's, tile by tile; packed in pairs it is an A fragment.
#pragma once

#include "sm90/ptx.cuh"

namespace infini::ptx {

#define INFINI_R4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define INFINI_R16(d, i) \
  INFINI_R4(d, i), INFINI_R4(d, i + 4), INFINI_R4(d, i + 8), INFINI_R4(d, i + 12)
#define INFINI_A32(d) INFINI_R16(d, 0), INFINI_R16(d, 16)
#define INFINI_A64(d) INFINI_A32(d), INFINI_R16(d, 32), INFINI_R16(d, 48)
#define INFINI_A128(d) \
  INFINI_A64(d), INFINI_R16(d, 64), INFINI_R16(d, 80), INFINI_R16(d, 96), INFINI_R16(d, 112)

#define INFINI_A16(d) INFINI_R16(d, 0)
#define INFINI_S16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define INFINI_S32 \
  INFINI_S16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define INFINI_S64                                                                     \
  INFINI_S32                                                                           \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define INFINI_S128                                                                              \
  INFINI_S64                                                                                     \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "           \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// `scale_d` 0: d = a b. TransA, TransB: 0 where k runs along the rows of 128 bytes that the
// descriptor describes, 1 where it runs across them.
template <class T, int N>
struct Wgmma;

// Operands are numbered behind the R accumulators: i0 is %R, and so on.
#define INFINI_WGMMA(T, type, N, R, i0, i1, i2, i3, i4, i5, i6)                                  \
  template <>                                                                                    \
  struct Wgmma<T, N> {                                                                           \
    template <int TransA, int TransB>                                                            \
    static __device__ __forceinline__ void ss(float (&d)[R], uint64_t a, uint64_t b,             \
                                              int scale_d) {                                     \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " i2                                        \
                   ", 0;\n"                                                                      \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type               \
                   " {" INFINI_S##R "}, " i0 ", " i1 ", p, 1, 1, " i3 ", " i4 ";\n}"             \
                   : INFINI_A##R(d)                                                              \
                   : "l"(a), "l"(b), "r"(scale_d), "n"(TransA), "n"(TransB));                    \
    }                                                                                            \
    template <int TransB>                                                                        \
    static __device__ __forceinline__ void rs(float (&d)[R], const uint32_t (&a)[4], uint64_t b, \
                                              int scale_d) {                                     \
      asm volatile(                                                                              \
          "{\n.reg .pred p;\nsetp.ne.b32 p, " i5                                                 \
          ", 0;\n"                                                                               \
          "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {" INFINI_S##R       \
          "}, {" i0 ", " i1 ", " i2 ", " i3 "}, " i4 ", p, 1, 1, " i6 ";\n}"                     \
          : INFINI_A##R(d)                                                                       \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(scale_d), "n"(TransB));      \
    }                                                                                            \
  };

#define INFINI_WGMMA_TYPE(T, type)                                                \
  INFINI_WGMMA(T, type, 32, 16, "%16", "%17", "%18", "%19", "%20", "%21", "%22")  \
  INFINI_WGMMA(T, type, 64, 32, "%32", "%33", "%34", "%35", "%36", "%37", "%38")  \
  INFINI_WGMMA(T, type, 128, 64, "%64", "%65", "%66", "%67", "%68", "%69", "%70") \
  INFINI_WGMMA(T, type, 256, 128, "%128", "%129", "%130", "%131", "%132", "%133", "%134")

INFINI_WGMMA_TYPE(Bf16, "bf16")
INFINI_WGMMA_TYPE(F16, "f16")

#undef INFINI_WGMMA_TYPE
#undef INFINI_WGMMA

// Registers are computed before this, not behind what follows: A fragments before the products that
// read them, results that are to overlap with products before the wait for these.
__device__ __forceinline__ void settle(uint32_t& x) { asm volatile("" : "+r"(x)::"memory"); }
__device__ __forceinline__ void settle(float& x) { asm volatile("" : "+f"(x)::"memory"); }

template <class X, int R>
__device__ __forceinline__ void settle(X (&x)[R]) {
#pragma unroll
  for (auto& each : x) settle(each);
}

// Waits until at most `Pending` groups are under way; `d` is what the caller reads next.
template <int Pending, int R>
__device__ __forceinline__ void wgmma_wait_group(float (&d)[R]) {
  wgmma_wait_group<Pending>();
  settle(d);
}

}  // namespace infini::ptx
