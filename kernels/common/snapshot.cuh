// The operand form of a memory: T, scaled by a power of two per 32 columns so that the largest
// magnitude of those columns lies in [1, 2), or below where that takes more than 2^64. A retrieval
// divides by it again.
#pragma once

#include "common/element.cuh"

namespace infini {

// The power of two that brings `top` into [1, 2), from 2^-126 to 2^Most; 1 when it is 0 or not
// finite.
template <int Most>
__device__ __forceinline__ float unit_scale(float top) {
  const uint32_t exponent = __float_as_uint(top) >> 23 & 0xff;
  if (top == 0.0f || exponent == 255) return 1.0f;
  return __uint_as_float(254 - min(max(exponent, 127 - Most), 253) << 23);
}

// The power of two for columns whose largest magnitude is `top`. No larger one: weights are
// multiplied by its inverse and are to stay normal numbers.
__device__ __forceinline__ float snapshot_scale(float top) { return unit_scale<64>(top); }

// 1 / scale, exactly: the scale is a power of two.
__device__ __forceinline__ float inverse_scale(float scale) {
  return __uint_as_float((254u << 23) - __float_as_uint(scale));
}

}  // namespace infini
