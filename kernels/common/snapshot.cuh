// The operand form of a memory: T, scaled by a power of two per 32 columns so that the largest
// magnitude of those columns lies in [1, 2). A retrieval divides by it again.
#pragma once

#include "common/element.cuh"

namespace infini {

// The power of two for columns whose largest magnitude is `top`, from 2^-126 to 2^126; 1 when that
// is 0 or not finite.
__device__ __forceinline__ float snapshot_scale(float top) {
  const uint32_t exponent = __float_as_uint(top) >> 23 & 0xff;
  if (top == 0.0f || exponent == 255) return 1.0f;
  return __uint_as_float(254 - min(max(exponent, 1u), 253u) << 23);
}

// 1 / scale, exactly: the scale is a power of two.
__device__ __forceinline__ float inverse_scale(float scale) {
  return __uint_as_float((254u << 23) - __float_as_uint(scale));
}

}  // namespace infini
