// Output rows of padding become 0, their log-sum-exp -inf: those behind a sequence's tokens, and all
// of a sequence that is padding itself.
//
// Grid (ceil(T / 8), Hq, sequences), a warp per token. No shared memory. Writes each row once.
#include "common/instantiate.h"
#include "common/piece.cuh"
#include "common/sequence.cuh"

namespace infini {

template <class T>
__device__ __forceinline__ void clear_padding(const InfiniClearPadding& p, unsigned char*) {
  const InfiniSequence s = sequence_of(p.sequences, blockIdx.z);
  const int token = blockIdx.x * 8 + threadIdx.x / 32, head = blockIdx.y, lane = threadIdx.x % 32;
  const int len = s.slot == INFINI_PAD_SLOT ? 0 : s.len;
  const bool padding = token < s.first || token - s.first >= len;
  if (token >= p.sequences.tokens || !padding || s.batch < 0 || s.batch >= p.sequences.count) return;
  for (const InfiniTensor* x : {&p.call.o, &p.call.a_dot, &p.call.a_mem}) {
    if (!x->data) continue;
    Chunk* row = reinterpret_cast<Chunk*>(row_of<T>(*x, s.batch, token, head));
    for (int i = lane; i < p.problem.value_dim / 8; i += 32) row[i] = Chunk{};
  }
  if (p.call.lse.data && lane == 0) {
    *row_of<float>(p.call.lse, s.batch, token, head) = -INFINITY;
  }
}

}  // namespace infini

INFINI_TYPE(clear_padding, InfiniClearPadding)
