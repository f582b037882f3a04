// Warp-wide exchanges and votes. Each launches with one warp, block 32; in [32].
//   warp_shuffles   out [cases][2][32]: value received, then the "in range" predicate
//                   cases: up 1 width 32, up 3 width 16, down 2 width 8, down 17 width 32,
//                   bfly 5 width 32, bfly 3 width 4, idx 5 width 8, idx (in & 31) width 32,
//                   idx (lane * 7) width 16
//   warp_votes      out [cases][32]: ballot, any, all, uniform (of in & 1), match_any, match_all,
//                   redux add, min, max (signed), umin, umax, and, or, xor, lanes of a half warp
//                   that see in > 0, activemask of the odd lanes
//   warp_sums       sums [2] of 32 floats: tree by shfl.down, butterfly by shfl.bfly (lane 31's)
//   warp_elect      (sm_90) out [32]: 1 in the lane elect.sync chose
#include "ptx.cuh"

namespace {

constexpr unsigned kFull = 0xffffffff;

#define SHUFFLE(mode)                                                                     \
  __device__ __forceinline__ void shfl_##mode(int value, int lane, int clamp, int* out) { \
    int d, p;                                                                             \
    asm volatile("{\n.reg .pred p;\nshfl.sync." #mode                                     \
                 ".b32 %0|p, %2, %3, %4, 0xffffffff;\n"                                   \
                 "selp.s32 %1, 1, 0, p;\n}"                                               \
                 : "=r"(d), "=r"(p)                                                       \
                 : "r"(value), "r"(lane), "r"(clamp));                                    \
    out[threadIdx.x] = d;                                                                 \
    out[32 + threadIdx.x] = p;                                                            \
  }
SHUFFLE(up)
SHUFFLE(down)
SHUFFLE(bfly)
SHUFFLE(idx)

// The clamp-and-segment operand of shfl for groups of `width` lanes.
__device__ __forceinline__ int clamp(int width, bool up) {
  return (32 - width) << 8 | (up ? 0 : 31);
}

}  // namespace

extern "C" __global__ void warp_shuffles(const int* in, int* out) {
  const int lane = threadIdx.x, value = in[lane];
  shfl_up(value, 1, clamp(32, true), out);
  shfl_up(value, 3, clamp(16, true), out += 64);
  shfl_down(value, 2, clamp(8, false), out += 64);
  shfl_down(value, 17, clamp(32, false), out += 64);
  shfl_bfly(value, 5, clamp(32, false), out += 64);
  shfl_bfly(value, 3, clamp(4, false), out += 64);
  shfl_idx(value, 5, clamp(8, false), out += 64);
  shfl_idx(value, value & 31, clamp(32, false), out += 64);
  shfl_idx(value, lane * 7, clamp(16, false), out += 64);
}

extern "C" __global__ void warp_votes(const int* in, int* out) {
  const int lane = threadIdx.x, value = in[lane];
  const bool odd = value & 1;
  int same, *next = out + lane;
  auto put = [&](int result) {
    *next = result;
    next += 32;
  };
  put(__ballot_sync(kFull, odd));
  put(__any_sync(kFull, odd));
  put(__all_sync(kFull, odd));
  put(__uni_sync(kFull, odd));
  put(__match_any_sync(kFull, value & 3));
  put(__match_all_sync(kFull, value, &same));
  put(__reduce_add_sync(kFull, value));
  put(__reduce_min_sync(kFull, value));
  put(__reduce_max_sync(kFull, value));
  put(__reduce_min_sync(kFull, static_cast<unsigned>(value)));
  put(__reduce_max_sync(kFull, static_cast<unsigned>(value)));
  put(__reduce_and_sync(kFull, static_cast<unsigned>(value)));
  put(__reduce_or_sync(kFull, static_cast<unsigned>(value)));
  put(__reduce_xor_sync(kFull, static_cast<unsigned>(value)));
  const unsigned half = lane < 16 ? 0x0000ffff : 0xffff0000;
  put(lane < 16 ? __ballot_sync(half, value > 0) : __ballot_sync(half, value > 0));
  unsigned active = 0;
  if (lane & 1) active = __activemask();
  __syncwarp();
  put(active);
}

extern "C" __global__ void warp_sums(const float* in, float* sums) {
  float down = in[threadIdx.x], around = down;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    down += __shfl_down_sync(kFull, down, step);
    around += __shfl_xor_sync(kFull, around, step);
  }
  if (threadIdx.x == 0) sums[0] = down;
  if (threadIdx.x == 31) sums[1] = around;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
extern "C" __global__ void warp_elect(int* out) { out[threadIdx.x] = ptx::elect_sync(); }
#endif
