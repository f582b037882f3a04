// Sum of f32 arrays, element by element in the order of the parts and rounded once.
//
// Grid of any size, a thread per 16 bytes; addresses are multiples of 16, the last elements may be
// fewer than four. `out` may be one of the inputs. No shared memory. Reads 4 bytes per element and
// part, writes 4; additions in f64, which even devices with few of its units do as fast as they
// read.
#include "common/instantiate.h"

namespace infini {

__device__ __forceinline__ void sum(const InfiniSum& p, unsigned char*) {
  const uint64_t* inputs = pointer<const uint64_t>(p.inputs);
  const int64_t step = int64_t{gridDim.x} * kElementThreads;
  const int64_t thread = int64_t{blockIdx.x} * kElementThreads + threadIdx.x;
#pragma unroll 1
  for (int64_t i = thread; i < p.count / 4; i += step) {
    double total[4] = {};
#pragma unroll 4
    for (int part = 0; part < p.parts; ++part) {
      const float4 x = pointer<const float4>(inputs[part])[i];
      total[0] += x.x;
      total[1] += x.y;
      total[2] += x.z;
      total[3] += x.w;
    }
    pointer<float4>(p.out)[i] = {static_cast<float>(total[0]), static_cast<float>(total[1]),
                                 static_cast<float>(total[2]), static_cast<float>(total[3])};
  }
  const int64_t i = p.count / 4 * 4 + thread;
  if (i >= p.count) return;
  double total = 0.0;
  for (int part = 0; part < p.parts; ++part) total += pointer<const float>(inputs[part])[i];
  pointer<float>(p.out)[i] = static_cast<float>(total);
}

}  // namespace infini

INFINI_KERNEL(infini_sum_sm80, sum, InfiniSum, infini::kElementThreads, 1)
