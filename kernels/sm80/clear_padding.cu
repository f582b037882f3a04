// Output rows behind a sequence's last token in a padded batch: 0, and -inf for the log-sum-exp.
//
// Grid (T / 8, Hq, B), a warp per row. No shared memory. Writes Dv elements per row and output.
#include "common/instantiate.h"
#include "common/piece.cuh"
#include "common/sequence.cuh"

namespace infini {

template <class T>
__device__ __forceinline__ void clear_padding(const InfiniClearPadding& p, unsigned char*) {
  const int token = blockIdx.x * (kElementThreads / kWarp) + threadIdx.x / kWarp;
  const int head = blockIdx.y, lane = threadIdx.x % kWarp;
  const InfiniSequence s = sequence_of(p.sequences, blockIdx.z);
  // Tables are checked, and reported, by those who read their tokens.
  if (s.batch < 0 || s.batch >= p.sequences.count) return;
  if (token < s.first + s.len || token >= p.sequences.tokens) return;
  for (const InfiniTensor* out : {&p.call.o, &p.call.a_dot, &p.call.a_mem}) {
    if (!out->data) continue;
    Chunk* row = reinterpret_cast<Chunk*>(row_of<T>(*out, s.batch, token, head));
    for (int i = lane; i < p.problem.value_dim / 8; i += kWarp) row[i] = Chunk{};
  }
  if (p.call.lse.data && lane == 0) {
    *row_of<float>(p.call.lse, s.batch, token, head) = -INFINITY;
  }
}

}  // namespace infini

INFINI_TYPE(clear_padding, InfiniClearPadding)
