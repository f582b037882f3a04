// σ(x) = ELU(x) + 1 and the retrieval's denominator, on tiles in shared memory.
#pragma once

#include "common/snapshot.cuh"
#include "common/tile.cuh"
#include "params.h"

namespace infini {

constexpr float kSmallestNormal = 1.17549435e-38f;
// From where on the reciprocal of a denominator is no normal number.
constexpr float kLargestDenominator = 0x1p126f;
constexpr float kLog2E = 1.44269504f;

// x + 1 for x > 0, e^x otherwise; below f32's smallest normal number 0 (ex2 flushes). NaN stays.
__device__ __forceinline__ float sigma(float x) {
  return x > 0.0f ? x + 1.0f : ptx::ex2_approx_ftz(x * kLog2E);
}

// What a row is scaled by, e^-shift (shift <= 0) and a power of two: a retrieval is invariant to it.
struct RowScale {
  float shift = 0.0f, factor = 1.0f;
};

// That of a row of queries with this largest channel: nothing underflows, and what is huge comes near
// 2^16, above all of f16.
__device__ __forceinline__ RowScale row_scale(float top) {
  // A row of -inf alone is weightless, as in the limit of ever smaller channels.
  return {top == -INFINITY ? 0.0f : fminf(top, 0.0f),
          top < 0x1p16f ? 1.0f : snapshot_scale(top) * 0x1p16f};
}

// Whether a row's product with z, for z is huge, calls for another scale: one that suffices.
__device__ __forceinline__ bool rescale(RowScale& scale, float dot) {
  const bool huge = dot > 0x1p96f;
  if (huge) scale.factor *= 0x1p-32f;
  return huge;
}

// The denominator under the problem's policy, of a row so scaled, and 0 where it counts as 0; NaN
// where it leaves the numbers that have a reciprocal.
__device__ __forceinline__ float denominator(const InfiniProblem& p, float dot, RowScale scale) {
  float den = dot;
  if (p.denominator != INFINI_DENOMINATOR_EXACT) {
    const float unit = scale.factor * ptx::ex2_approx_ftz(-scale.shift * kLog2E);
    const float epsilon = p.epsilon * unit;
    // Of a row as small as that nothing is left.
    if (epsilon > kLargestDenominator) return 0.0f;
    den = p.denominator == INFINI_DENOMINATOR_CLAMP ? fmaxf(dot, epsilon) : dot + epsilon;
  }
  if (fabsf(den) < kSmallestNormal * fminf(scale.factor, 1.0f)) return 0.0f;
  return den <= kLargestDenominator ? den : NAN;
}

// How many lanes share a row of `Columns` elements in map_keys: a power of two that divides its
// chunks.
template <int Columns>
constexpr int kRowLanes = Columns % 64 == 0 ? 8 : 4;

template <int Lanes>
__device__ __forceinline__ float lanes_max(float x) {
#pragma unroll
  for (int i = Lanes / 2; i > 0; i /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, i));
  return x;
}

template <int Lanes>
__device__ __forceinline__ float lanes_sum(float x) {
#pragma unroll
  for (int i = Lanes / 2; i > 0; i /= 2) x += __shfl_xor_sync(0xffffffff, x, i);
  return x;
}

// Largest of a block's values; every thread gets it.
template <int Threads>
__device__ __forceinline__ float block_max(float x) {
  __shared__ float warps[Threads / 32];
  x = lanes_max<32>(x);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  for (int i = 0; i < Threads / 32; ++i) x = fmaxf(x, warps[i]);
  __syncthreads();
  return x;
}

__device__ __forceinline__ Chunk load_chunk(uint32_t address) {
  Chunk c;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(c.x[0]), "=r"(c.x[1]), "=r"(c.x[2]), "=r"(c.x[3])
               : "r"(address)
               : "memory");
  return c;
}

__device__ __forceinline__ void store_chunk(uint32_t address, const Chunk& c) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(c.x[0]), "r"(c.x[1]),
               "r"(c.x[2]), "r"(c.x[3])
               : "memory");
}

// Largest channel of a row held in 16-byte chunks by `Lanes` lanes.
template <int Lanes, class Tile>
__device__ __forceinline__ float row_max(const Tile& tile, int row, int lane) {
  float top = -INFINITY;
#pragma unroll
  for (int chunk = lane; chunk < Tile::columns / 8; chunk += Lanes) {
    float x[8];
    widen<typename Tile::Element>(load_chunk(tile.at(row, chunk)), x);
#pragma unroll
    for (float value : x) top = fmaxf(top, value);
  }
  return lanes_max<Lanes>(top);
}

// z lies in shared memory with the lower halves of all chunks first, then the upper ones, so that
// the lanes of a row read pieces of 16 bytes that lie side by side: the channel at an index.
template <int Columns>
__device__ __forceinline__ int z_channel(int index) {
  const int half = index / (Columns / 2), i = index % (Columns / 2);
  return i / 4 * 8 + half * 4 + i % 4;
}

// The power of two that brings z's largest channel into [1, 2): what keys of any size retrieve is
// then found with a denominator that neither under- nor overflows. Each warp finds it for itself.
template <int Dk>
__device__ __forceinline__ float normaliser_scale(const float* z) {
  float top = 0.0f;
#pragma unroll
  for (int i = threadIdx.x % 32; i < Dk; i += 32) top = fmaxf(top, fabsf(z[i]));
  return snapshot_scale(lanes_max<32>(top));
}

// The channels of z at a chunk; z [Columns] lies in shared memory in the order of z_channel.
template <int Columns>
__device__ __forceinline__ void z_chunk(const float* z, int chunk, float (&x)[8]) {
#pragma unroll
  for (int c = 0; c < 8; ++c) x[c] = z[chunk * 4 + c % 4 + c / 4 * (Columns / 2)];
}

// σ of a chunk, scaled and rounded; adds its product with z to `dot`.
template <class T>
__device__ __forceinline__ Chunk map_chunk(const Chunk& chunk, const float (&z)[8], RowScale scale,
                                           float& dot) {
  float x[8];
  widen<T>(chunk, x);
#pragma unroll
  for (float& value : x) value = sigma(value - scale.shift) * scale.factor;
  const Chunk mapped = narrow<T>(x);
  widen<T>(mapped, x);
#pragma unroll
  for (int c = 0; c < 8; ++c) dot += x[c] * z[c];
  return mapped;
}

// The same of a chunk of a tile.
template <class Tile>
__device__ __forceinline__ Chunk map_chunk(const Tile& tile, const float* z, int row, int chunk,
                                           RowScale scale, float& dot) {
  const Chunk raw = load_chunk(tile.at(row, chunk));
  float x[8];
  z_chunk<Tile::columns>(z, chunk, x);
  return map_chunk<typename Tile::Element>(raw, x, scale, dot);
}

// σ of every row of a tile, in place and rounded; rows from `end` on become 0. `each(row, den,
// first)` gets the denominator of the rounded row in all lanes of the row, in the unit by which z
// was multiplied, `first` true in one of them. `Threads` threads take part, from the block's first
// on; the caller synchronises before and after.
template <int Threads, class Tile, class Each>
__device__ __forceinline__ void map_keys(const InfiniProblem& p, const Tile& tile, const float* z,
                                         float unit, int end, Each each) {
  constexpr int lanes = kRowLanes<Tile::columns>;
  const int lane = threadIdx.x % lanes;
#pragma unroll 1
  for (int row = threadIdx.x / lanes; row < Tile::rows; row += Threads / lanes) {
    float dot = 0.0f;
#pragma unroll 2
    for (int chunk = lane; chunk < Tile::columns / 8; chunk += lanes) {
      const Chunk mapped = map_chunk(tile, z, row, chunk, RowScale{}, dot);
      store_chunk(tile.at(row, chunk), row < end ? mapped : Chunk{});
    }
    each(row, denominator(p, lanes_sum<lanes>(dot), {0.0f, unit}), lane == 0);
  }
}

// The same of queries, of scaled rows. (Keys are written, and not scaled.) `each` returns whether
// the row counts: one that does not becomes 0.
template <int Threads, class Tile, class Each>
__device__ __forceinline__ void map_queries(const InfiniProblem& p, const Tile& tile,
                                            const float* z, int end, Each each) {
  constexpr int lanes = kRowLanes<Tile::columns>, each_lane = Tile::columns / 8 / lanes;
  const int lane = threadIdx.x % lanes;
#pragma unroll 1
  for (int row = threadIdx.x / lanes; row < Tile::rows; row += Threads / lanes) {
    RowScale scale = row_scale(row_max<lanes>(tile, row, lane));
    Chunk mapped[each_lane];
    float dot;
#pragma unroll 1
    for (int run = 0;; ++run) {
      dot = 0.0f;
#pragma unroll
      for (int i = 0; i < each_lane; ++i) {
        mapped[i] = map_chunk(tile, z, row, lane + i * lanes, scale, dot);
      }
      dot = lanes_sum<lanes>(dot);
      if (run == 1 || !__any_sync(0xffffffff, rescale(scale, dot))) break;
    }
    const float den = denominator(p, dot, scale);
    const bool counts = each(row, den, lane == 0) && row < end;
#pragma unroll
    for (int i = 0; i < each_lane; ++i) {
      store_chunk(tile.at(row, lane + i * lanes), counts ? mapped[i] : Chunk{});
    }
  }
}

}  // namespace infini
