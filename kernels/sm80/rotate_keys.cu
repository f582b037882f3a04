// First step of a prefill with rotation: every new key is rotated once, for all the query tiles and
// query heads that read it.
//
// Grid (N / 8, Hkv, pieces), a warp per token of a piece's new ones. No shared memory. Reads and
// writes Dk elements per token and head; the tables' rows are shared by the heads.
#include "common/instantiate.h"
#include "common/piece.cuh"
#include "common/rotate.cuh"

namespace infini {

template <class T>
__device__ __forceinline__ void rotate_keys(const InfiniRotateKeys& p, unsigned char*) {
  const int token = blockIdx.x * (kElementThreads / kWarp) + threadIdx.x / kWarp;
  const int kv_head = blockIdx.y, index = blockIdx.z, dk = p.problem.key_dim;
  const InfiniPiece& piece = pointer<const InfiniPiece>(p.run.pieces)[index];
  if (token >= piece.len) return;
  const T* from = row_of<T>(p.k, piece.batch, piece.first + token, kv_head);
  T* to = segment_rows<T>(p.rotated, p.problem, index, kv_head, dk) + int64_t{token} * dk;
  const int64_t position =
      position_of(p.rope, piece.batch, piece.first + token, piece.position + token);
  rotate_row<kWarp>(GlobalRow<T>{from, to}, dk, p.rope, position, p.status, threadIdx.x % kWarp);
}

}  // namespace infini

INFINI_TYPE(rotate_keys, InfiniRotateKeys)
