// 16-bit element types: conversions and packing.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace infini {

using Bf16 = __nv_bfloat16;
using F16 = __half;

// Two floats rounded to T: `low` in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<Bf16>(float low, float high) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

template <>
__device__ __forceinline__ uint32_t pack<F16>(float low, float high) {
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

// The two elements of a register.
template <class T>
__device__ __forceinline__ float2 unpack(uint32_t x);

template <>
__device__ __forceinline__ float2 unpack<Bf16>(uint32_t x) {
  return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)};
}

template <>
__device__ __forceinline__ float2 unpack<F16>(uint32_t x) {
  __half2 h;
  memcpy(&h, &x, 4);
  return __half22float2(h);
}

// Eight elements: one 16-byte chunk of a row.
struct alignas(16) Chunk {
  uint32_t x[4];
};

template <class T>
__device__ __forceinline__ void widen(const Chunk& chunk, float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack<T>(chunk.x[i]);
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
}

template <class T>
__device__ __forceinline__ Chunk narrow(const float (&x)[8]) {
  Chunk chunk;
#pragma unroll
  for (int i = 0; i < 4; ++i) chunk.x[i] = pack<T>(x[2 * i], x[2 * i + 1]);
  return chunk;
}

template <class T>
__device__ __forceinline__ T* pointer(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace infini
