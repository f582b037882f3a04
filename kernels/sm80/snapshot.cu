// Snapshots of memories that were written other than by the kernels that bring tokens.
//
// Grid (Dv / 32, matrices), a block per Dk x 32 of a matrix, held in registers (Dk is at most 256):
// read, largest magnitude over the block, written scaled. Shared memory: one float per warp.
//
// Reads 128 Dk bytes, writes 64 Dk.
#include "common/feature_map.cuh"
#include "common/instantiate.h"
#include "common/snapshot.cuh"

namespace infini {

template <class T>
__device__ __forceinline__ void snapshot(const InfiniSnapshot& p, unsigned char*) {
  constexpr int kChunks = INFINI_SCALE_COLUMNS / 4;  // of four columns
  constexpr int kRows = kElementThreads / kChunks;   // rows per pass
  constexpr int kPasses = 256 / kRows;
  const int row = threadIdx.x / kChunks;
  const int64_t matrix = blockIdx.y;
  const int64_t start = matrix * p.key_dim * p.value_dim + blockIdx.x * INFINI_SCALE_COLUMNS +
                        threadIdx.x % kChunks * 4;
  const auto at = [&](int pass) { return start + int64_t{row + pass * kRows} * p.value_dim; };

  float4 x[kPasses];
  float top = 0.0f;
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    if (i * kRows >= p.key_dim) break;
    x[i] = *reinterpret_cast<const float4*>(pointer<const float>(p.memory) + at(i));
    top =
        fmaxf(fmaxf(top, fmaxf(fabsf(x[i].x), fabsf(x[i].y))), fmaxf(fabsf(x[i].z), fabsf(x[i].w)));
  }
  const float scale = snapshot_scale(block_max<kElementThreads>(top));
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    if (i * kRows >= p.key_dim) break;
    *reinterpret_cast<uint2*>(pointer<T>(p.snapshot) + at(i)) = {
        pack<T>(x[i].x * scale, x[i].y * scale), pack<T>(x[i].z * scale, x[i].w * scale)};
  }
  if (threadIdx.x == 0) {
    pointer<float>(p.snapshot_scale)[matrix * gridDim.x + blockIdx.x] = scale;
  }
}

}  // namespace infini

INFINI_TYPE(snapshot, InfiniSnapshot)
