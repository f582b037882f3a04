// The end of an update: the last block of a (sequence, KV head) adds the partial updates in index
// order and writes M, z and the snapshot in place.
#pragma once

#include "common/sequence.cuh"
#include "common/snapshot.cuh"

namespace infini {

// What the blocks of one head exchange: f32 [chunks][Dk * Dv + Dk], dM and column sums.
template <int Dk, int Dv>
__device__ __forceinline__ float* partial_of(const InfiniExchange& exchange, int64_t head,
                                             int chunks, int chunk) {
  return pointer<float>(exchange.partials) + (head * chunks + chunk) * (Dk * Dv + Dk);
}

// M of one slot and head += the first `used` partials; z and the snapshot follow. 32 columns at a
// time, which share a scale and fit the registers.
template <int Threads, class T, int Dk, int Dv>
__device__ __forceinline__ void finish_memory(const InfiniState& state, int64_t matrix, bool empty,
                                              const float* partials, int used) {
  constexpr int kEach = Dk * 8 / Threads;  // groups of 4 columns per thread
  static_assert(Dk * 8 % Threads == 0);
  constexpr int64_t kStride = Dk * Dv + Dk;
  float* m = pointer<float>(state.memory) + matrix * (Dk * Dv);
  T* snapshot = pointer<T>(state.snapshot) + matrix * (Dk * Dv);
#pragma unroll 1
  for (int column = 0; column < Dv; column += 32) {
    float4 x[kEach];
    float top = 0.0f;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int group = threadIdx.x + i * Threads, at = group / 8 * Dv + column + group % 8 * 4;
      x[i] = empty ? float4{} : *reinterpret_cast<const float4*>(m + at);
      for (int part = 0; part < used; ++part) {
        const float4 d = *reinterpret_cast<const float4*>(partials + part * kStride + at);
        x[i] = {x[i].x + d.x, x[i].y + d.y, x[i].z + d.z, x[i].w + d.w};
      }
      *reinterpret_cast<float4*>(m + at) = x[i];
      top = fmaxf(top,
                  fmaxf(fmaxf(fabsf(x[i].x), fabsf(x[i].y)), fmaxf(fabsf(x[i].z), fabsf(x[i].w))));
    }
    const float scale = snapshot_scale(block_max<Threads>(top));
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int group = threadIdx.x + i * Threads, at = group / 8 * Dv + column + group % 8 * 4;
      *reinterpret_cast<uint2*>(snapshot + at) = {pack<T>(x[i].x * scale, x[i].y * scale),
                                                  pack<T>(x[i].z * scale, x[i].w * scale)};
    }
    if (threadIdx.x == 0) {
      pointer<float>(state.snapshot_scale)[matrix * (Dv / 32) + column / 32] = scale;
    }
  }
  float* z = pointer<float>(state.normalizer) + matrix * Dk;
  for (int i = threadIdx.x; i < Dk; i += Threads) {
    float sum = empty ? 0.0f : z[i];
    for (int part = 0; part < used; ++part) sum += partials[part * kStride + Dk * Dv + i];
    z[i] = sum;
  }
}

}  // namespace infini
