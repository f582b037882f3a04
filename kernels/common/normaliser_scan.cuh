// Phase 2 of prefill: z before every piece, a prefix sum of column sums, and z after the run.
//
// Grid (Hkv, chains), a thread per channel, serial over the chain's pieces, whose sums are loaded
// many at a time. No shared memory. Reads and writes 4 Dk bytes per piece (and split).
#pragma once

#include "common/chain.cuh"
#include "common/tiles.h"

namespace infini {

// Pieces whose sums a thread loads at a time.
constexpr int kPiecesAtOnce = 16;

__device__ __forceinline__ void normaliser_scan(const InfiniNormaliserScan& p, unsigned char*) {
  const InfiniChain chain = pointer<const InfiniChain>(p.run.chains)[blockIdx.y];
  const int dk = p.problem.key_dim, kv_heads = p.problem.kv_heads, head = blockIdx.x;
  const int64_t state = (int64_t{chain.slot} * kv_heads + head) * dk;
  const int64_t first = int64_t{chain.first_piece} * kv_heads + head, stride = kv_heads * dk;
  const int full = full_pieces(p.run, chain);
  for (int c = threadIdx.x; c < dk; c += kElementThreads) {
    float z = chain.empty ? 0.0f : pointer<const float>(p.start)[state + c];
    float* before = pointer<float>(p.z) + first * dk + c;
    const float* sums = pointer<const float>(p.sums) + first * p.splits * dk + c;
#pragma unroll 1
    for (int i = 0; i < full; i += kPiecesAtOnce) {
      float x[kPiecesAtOnce] = {};
#pragma unroll 2
      for (int split = 0; split < p.splits; ++split, sums += dk) {
#pragma unroll
        for (int j = 0; j < kPiecesAtOnce; ++j) {
          if (i + j < full) x[j] += sums[j * stride * p.splits];
        }
      }
      sums += (kPiecesAtOnce * stride - dk) * p.splits;
#pragma unroll
      for (int j = 0; j < kPiecesAtOnce; ++j, before += stride) {
        if (i + j < full) *before = z;
        z += x[j];
      }
    }
    if (full < chain.pieces) pointer<float>(p.z)[first * dk + full * stride + c] = z;
    pointer<float>(p.end)[state + c] = z;
  }
}

}  // namespace infini
