// The end of a prefill: tokens after the last full segment go into the slot's open segment, and the
// counters to their values after the call.
//
// Grid (ceil(N / 8), Hkv, chains), a warp per token. No shared memory. Reads and writes each key
// (and rotated key) and value once.
#include "common/instantiate.h"
#include "common/open_rows.cuh"

namespace infini {

template <class T>
__device__ __forceinline__ void append(const InfiniAppend& p, unsigned char*) {
  const InfiniChain& chain = pointer<const InfiniChain>(p.run.chains)[blockIdx.z];
  if (!chain.ends) return;
  const int index = chain.first_piece + chain.pieces - 1, kv_head = blockIdx.y;
  const InfiniPiece& piece = pointer<const InfiniPiece>(p.run.pieces)[index];
  const int token = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool rotates = p.call.rope.rows > 0;
  const int dk = p.problem.key_dim, dv = p.problem.value_dim;
  if (!piece.full && token < piece.len) {
    const int64_t to = piece.cached + token;
    const auto open = [&](uint64_t address, int columns) {
      return segment_rows<T>(address, p.problem, piece.slot, kv_head, columns) + to * columns;
    };
    const auto fresh = [&](const InfiniTensor& x) {
      return row_of<const T>(x, piece.batch, piece.first + token, kv_head);
    };
    copy_row<32>(open(p.state.open_k, dk), fresh(p.call.k), dk, lane);
    copy_row<32>(open(p.state.open_v, dv), fresh(p.call.v), dv, lane);
    if (rotates) {
      const T* rotated = segment_rows<T>(p.rotated, p.problem, index, kv_head, dk);
      copy_row<32>(open(p.state.open_k_rotated, dk), rotated + int64_t{token} * dk, dk, lane);
    }
  }
  if (blockIdx.x == 0 && kv_head == 0 && threadIdx.x == 0) {
    InfiniCounters& c = pointer<InfiniCounters>(p.state.counters)[chain.slot];
    c.tokens = chain.tokens;
    c.committed = chain.committed;
    c.open_len = piece.full ? 0 : piece.cached + piece.len;
    c.rotated = rotates;
    c.taken = 0;
  }
}

}  // namespace infini

INFINI_TYPE(append, InfiniAppend)
