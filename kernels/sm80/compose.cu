// Affine maps of memories: c = a b + d per matrix, in f32 throughout: I - G must not be rounded
// below that, so no tensor core is used.
//
// Tile: 32 x 32 of c per block, a warp per 4 rows and a lane per column; 32 channels of a and b at
// a time through shared memory. Grid (columns / 32, Dk / 32, matrices).
//
// Shared memory: a [32 x 32] and b [32 x 32], 8 KiB. Barriers: __syncthreads only, two per 32
// channels: all are done with the tiles before; the tiles are there.
//
// Per block 2048 Dk flops; reads 256 Dk bytes, all but the first time from L2.
#include "common/instantiate.h"

namespace infini {

__device__ __forceinline__ void compose(const InfiniCompose& p, unsigned char*) {
  constexpr int kTile = 32, kRows = kTile / (kElementThreads / kWarp);
  __shared__ float4 a[kTile][kTile / 4];
  __shared__ float4 b[kTile][kTile / 4];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int row = blockIdx.y * kTile, column = blockIdx.x * kTile;
  const int64_t matrix = int64_t{blockIdx.z} * p.key_dim;
  // Each thread brings 16 bytes of both tiles.
  const int r = threadIdx.x / (kTile / 4), chunk = threadIdx.x % (kTile / 4);
  const float* from_a = pointer<const float>(p.a) + (matrix + row + r) * p.key_dim + chunk * 4;
  const float* from_b = pointer<const float>(p.b) + (matrix + r) * p.columns + column + chunk * 4;

  float c[kRows] = {};
#pragma unroll 1
  for (int k = 0; k < p.key_dim; k += kTile) {
    const float4 next_a = *reinterpret_cast<const float4*>(from_a + k);
    const float4 next_b = *reinterpret_cast<const float4*>(from_b + int64_t{k} * p.columns);
    __syncthreads();  // all are done with the tiles before
    a[r][chunk] = next_a;
    b[r][chunk] = next_b;
    __syncthreads();  // the tiles are there
#pragma unroll
    for (int kk = 0; kk < kTile; kk += 4) {
      float y[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) y[i] = reinterpret_cast<const float*>(b[kk + i])[lane];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float4 x = a[warp * kRows + i][kk / 4];
        c[i] = fmaf(x.x, y[0], fmaf(x.y, y[1], fmaf(x.z, y[2], fmaf(x.w, y[3], c[i]))));
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int64_t at = (matrix + row + warp * kRows + i) * p.columns + column + lane;
    if (p.d) c[i] += pointer<const float>(p.d)[at];
    pointer<float>(p.c)[at] = c[i];
  }
}

}  // namespace infini

INFINI_KERNEL(infini_compose_sm80, compose, InfiniCompose, infini::kElementThreads, 1)
