// Local attentions over disjoint keys into one: out = sum of exp(lse[i] - L) a_dot[i] with
// L = ln sum exp(lse[i]).
//
// Grid (B T / INFINI_MERGE_ROWS, Hq), a warp per four rows; parts in batches of 32, a lane per part
// for the weights and a lane per 16 bytes of the row for the sum. What is summed so far is kept
// divided by its weights' sum, so that no intermediate is larger than the parts. The parts' tensors
// lie in shared memory, 2 KiB per batch.
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

// The tensors of a batch of parts.
struct Batch {
  InfiniTensor a_dot[kWarp], lse[kWarp];

  // By all threads of the block.
  __device__ __forceinline__ void load(const InfiniMergePartials& p, int first) {
    static_assert(2 * kWarp <= kElementThreads, "a thread per tensor");
    const int side = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    if (side >= 2 || first + lane >= p.parts) return;
    (side ? lse : a_dot)[lane] = pointer<const InfiniTensor>(side ? p.lse : p.a_dot)[first + lane];
  }
};

// One row of the result: what a warp knows of it.
template <class T>
struct Row {
  int64_t batch, token;
  Merged merged;
  float out[8] = {};

  __device__ __forceinline__ void add(const Batch& parts, int count, int head, int chunk,
                                      bool mine) {
    const int lane = threadIdx.x % kWarp;
    float lse = -INFINITY, keep;
    uint64_t from = 0;  // a part that attended nothing is not read
    if (lane < count) lse = *row_of<float>(parts.lse[lane], batch, token, head);
    if (lse != -INFINITY) {
      from = reinterpret_cast<uint64_t>(row_of<T>(parts.a_dot[lane], batch, token, head));
    }
    const float weight = merged.add(lse, keep);
#pragma unroll
    for (float& x : out) x *= keep;
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      const uint64_t part = __shfl_sync(0xffffffff, from, i);
      const float w = __shfl_sync(0xffffffff, weight, i);
      float x[8];
      widen<T>(part && mine ? pointer<const Chunk>(part)[chunk] : Chunk{}, x);
#pragma unroll
      for (int c = 0; c < 8; ++c) out[c] += w * x[c];
    }
  }
};

template <class T>
__device__ __forceinline__ void merge_partials(const InfiniMergePartials& p, unsigned char*) {
  constexpr int kRows = INFINI_MERGE_ROWS / (kElementThreads / kWarp);
  __shared__ Batch parts;
  const int lane = threadIdx.x % kWarp, head = blockIdx.y;
  const int64_t first_row = int64_t{blockIdx.x} * INFINI_MERGE_ROWS + threadIdx.x / kWarp * kRows;
  const int64_t rows = p.batches * p.tokens - first_row;  // of this warp: those below kRows

#pragma unroll 1
  for (int block = 0; block < p.value_dim / 8; block += kWarp) {
    const int chunk = block + lane;
    const bool mine = chunk < p.value_dim / 8;
    Row<T> row[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      row[r].batch = (first_row + r) / p.tokens;
      row[r].token = (first_row + r) % p.tokens;
    }
#pragma unroll 1
    for (int first = 0; first < p.parts; first += kWarp) {
      __syncthreads();
      parts.load(p, first);
      __syncthreads();
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r < rows) row[r].add(parts, min(kWarp, p.parts - first), head, chunk, mine);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) continue;
      const Row<T>& x = row[r];
      if (mine) {
        T* to = row_of<T>(p.out, x.batch, x.token, head);
        reinterpret_cast<Chunk*>(to)[chunk] = narrow<T>(x.out);
      }
      if (block == 0 && lane == 0 && p.out_lse.data) {
        *row_of<float>(p.out_lse, x.batch, x.token, head) =
            x.merged.sum == 0.0f ? -INFINITY : x.merged.top + logf(x.merged.sum);
      }
    }
  }
}

}  // namespace infini

INFINI_TYPE(merge_partials, InfiniMergePartials)
