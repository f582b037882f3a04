// Phase 2 of prefill: z before every piece, a prefix sum of column sums, and z after the run.
//
// Grid (Hkv, chains), a thread per channel, serial over the chain's pieces. No shared memory. Reads
// and writes 4 Dk bytes per piece (and split).
#include "common/instantiate.h"

namespace infini {

__device__ __forceinline__ void normaliser_scan(const InfiniNormaliserScan& p, unsigned char*) {
  const InfiniChain chain = pointer<const InfiniChain>(p.run.chains)[blockIdx.y];
  const int dk = p.problem.key_dim, kv_heads = p.problem.kv_heads, head = blockIdx.x;
  const int64_t state = (int64_t{chain.slot} * kv_heads + head) * dk;
  for (int c = threadIdx.x; c < dk; c += kElementThreads) {
    float z = chain.empty ? 0.0f : pointer<const float>(p.start)[state + c];
    for (int i = chain.first_piece; i < chain.first_piece + chain.pieces; ++i) {
      const int64_t record = int64_t{i} * kv_heads + head;
      pointer<float>(p.z)[record * dk + c] = z;
      if (!pointer<const InfiniPiece>(p.run.pieces)[i].full) continue;
      const float* sums = pointer<const float>(p.sums) + record * p.splits * dk + c;
      for (int s = 0; s < p.splits; ++s) z += sums[int64_t{s} * dk];
    }
    pointer<float>(p.end)[state + c] = z;
  }
}

}  // namespace infini

INFINI_KERNEL(infini_normaliser_scan_sm80, normaliser_scan, InfiniNormaliserScan,
              infini::kElementThreads, 1)
