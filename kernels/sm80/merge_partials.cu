// Local attentions over disjoint keys into one: out = sum of exp(lse[i] - L) a_dot[i] with
// L = ln sum exp(lse[i]).
//
// Grid (B T / 8, Hq), a warp per row; parts in batches of 32, a lane per part for the weights and a
// lane per 16 bytes of the row for the sum. What is summed so far is kept divided by its weights'
// sum, so that no intermediate is larger than the parts. No shared memory.
//
// Reads Dv elements and a log-sum-exp per row and part, once; writes Dv elements per row.
#include "common/feature_map.cuh"
#include "common/instantiate.h"
#include "common/piece.cuh"

namespace infini {

// Parts taken so far: largest log-sum-exp, sum of exponentials relative to it.
struct Merged {
  float top = -INFINITY;
  float sum = 0.0f;

  // Takes the log-sum-exp of one more part per lane, -inf for none. Returns the lane's weight;
  // `keep` is what earlier weights shrink by.
  __device__ __forceinline__ float add(float lse, float& keep) {
    const float before = top;
    top = fmaxf(top, lanes_max<32>(lse));
    // Nothing attended yet (or NaN alone): any finite shift will do.
    const float shift = top == -INFINITY ? 0.0f : top;
    const float weight = lse == -INFINITY ? 0.0f : expf(lse - shift);
    const float earlier = sum * expf(before - shift);
    sum = earlier + lanes_sum<32>(weight);
    keep = sum == 0.0f ? 0.0f : earlier / sum;
    return sum == 0.0f ? 0.0f : weight / sum;
  }
};

template <class T>
__device__ __forceinline__ void merge_partials(const InfiniMergePartials& p, unsigned char*) {
  const int lane = threadIdx.x % kWarp, head = blockIdx.y;
  const int64_t row = int64_t{blockIdx.x} * (kElementThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= p.batches * p.tokens) return;
  const int64_t batch = row / p.tokens, token = row % p.tokens;
  const InfiniTensor* parts = pointer<const InfiniTensor>(p.a_dot);
  const InfiniTensor* logs = pointer<const InfiniTensor>(p.lse);

#pragma unroll 1
  for (int block = 0; block < p.value_dim / 8; block += kWarp) {
    const int chunk = block + lane;
    const bool mine = chunk < p.value_dim / 8;
    Merged merged;
    float out[8] = {};
#pragma unroll 1
    for (int first = 0; first < p.parts; first += kWarp) {
      float lse = -INFINITY, keep;
      uint64_t from = 0;  // a part that attended nothing is not read
      if (first + lane < p.parts) lse = *row_of<float>(logs[first + lane], batch, token, head);
      if (lse != -INFINITY) {
        from = reinterpret_cast<uint64_t>(row_of<T>(parts[first + lane], batch, token, head));
      }
      const float weight = merged.add(lse, keep);
#pragma unroll
      for (float& x : out) x *= keep;
#pragma unroll 4
      for (int i = 0; i < min(kWarp, p.parts - first); ++i) {
        const uint64_t part = __shfl_sync(0xffffffff, from, i);
        const float w = __shfl_sync(0xffffffff, weight, i);
        float x[8];
        widen<T>(part && mine ? pointer<const Chunk>(part)[chunk] : Chunk{}, x);
#pragma unroll
        for (int c = 0; c < 8; ++c) out[c] += w * x[c];
      }
    }
    if (mine) {
      reinterpret_cast<Chunk*>(row_of<T>(p.out, batch, token, head))[chunk] = narrow<T>(out);
    }
    if (block == 0 && lane == 0 && p.out_lse.data) {
      *row_of<float>(p.out_lse, batch, token, head) =
          merged.sum == 0.0f ? -INFINITY : merged.top + logf(merged.sum);
    }
  }
}

}  // namespace infini

INFINI_TYPE(merge_partials, InfiniMergePartials)
