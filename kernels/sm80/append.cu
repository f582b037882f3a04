// Last step of a prefill: a chain's last piece, unless full, goes into the open segment of its slot,
// and the slot's counters get the values after the chain.
//
// Grid (N / 8, Hkv, chains), a block per 8 tokens of that piece; the first block of a chain writes
// the counters. No shared memory. Reads and writes Dk + Dv elements per token and head, with
// rotation 2 Dk + Dv.
#include "common/instantiate.h"
#include "common/piece.cuh"

namespace infini {

// Copies 8 rows of `columns` elements, fewer at the end of a piece; the block takes part as a whole.
template <class T>
__device__ __forceinline__ void copy_rows(T* to, const Rows<T>& from, int first, int end,
                                          int columns) {
  const int chunks = columns / 8;
  for (int i = threadIdx.x; i < (end - first) * chunks; i += kElementThreads) {
    const int row = first + i / chunks, chunk = i % chunks;
    reinterpret_cast<Chunk*>(to + int64_t{row} * columns)[chunk] =
        reinterpret_cast<const Chunk*>(from.row(row))[chunk];
  }
}

template <class T>
__device__ __forceinline__ void append(const InfiniAppend& p, unsigned char*) {
  const InfiniChain& chain = pointer<const InfiniChain>(p.run.chains)[blockIdx.z];
  if (chain.pieces == 0) return;
  const int index = chain.first_piece + chain.pieces - 1, kv_head = blockIdx.y;
  const InfiniPiece& piece = pointer<const InfiniPiece>(p.run.pieces)[index];
  const bool rotates = p.call.rope.rows > 0;

  if (blockIdx.x == 0 && kv_head == 0 && threadIdx.x == 0) {
    const uint32_t open = piece.full ? 0 : piece.cached + piece.len;
    pointer<InfiniCounters>(p.state.counters)[chain.slot] = {
        chain.tokens, chain.committed, open, open > 0 && rotates, 0, 0};
  }

  const int first = blockIdx.x * 8, end = min(first + 8, piece.len);
  if (piece.full || first >= end) return;
  const int dk = p.problem.key_dim, dv = p.problem.value_dim;
  const SegmentRows<T> k = keys_of<T>(p.problem, p.call.k, p.state, piece, kv_head);
  const SegmentRows<T> v = values_of<T>(p.problem, p.call.v, p.state, piece, kv_head);
  const auto open_rows = [&](uint64_t address, int columns) {
    return segment_rows<T>(address, p.problem, chain.slot, kv_head, columns) +
           int64_t{piece.cached} * columns;
  };
  copy_rows(open_rows(p.state.open_k, dk), k.fresh, first, end, dk);
  copy_rows(open_rows(p.state.open_v, dv), v.fresh, first, end, dv);
  if (rotates) {
    const Rows<T> rotated{segment_rows<T>(p.rotated, p.problem, index, kv_head, dk), dk};
    copy_rows(open_rows(p.state.open_k_rotated, dk), rotated, first, end, dk);
  }
}

}  // namespace infini

INFINI_TYPE(append, InfiniAppend)
