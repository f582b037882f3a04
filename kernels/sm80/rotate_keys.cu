// Rotates the new keys of every piece into the workspace, once for all query tiles and heads that
// will read them. Tensor copies bring whole blocks of rows: those behind the last key are zero.
//
// Grid (ceil(N / 8), Hkv, pieces), a warp per token. No shared memory. Reads and writes each key
// once, and its row of the tables.
#include "common/instantiate.h"
#include "common/piece.cuh"
#include "common/rotate.cuh"

namespace infini {

template <class T>
__device__ __forceinline__ void rotate_keys(const InfiniRotateKeys& p, unsigned char*) {
  const InfiniPiece& piece = pointer<const InfiniPiece>(p.run.pieces)[blockIdx.z];
  const int token = blockIdx.x * 8 + threadIdx.x / 32, kv_head = blockIdx.y;
  const int block = static_cast<int>(p.block), rows = (piece.len + block - 1) / block * block;
  if (token >= min(p.problem.segment_len, rows)) return;
  const int dk = p.problem.key_dim, lane = threadIdx.x % 32;
  T* to = segment_rows<T>(p.rotated, p.problem, blockIdx.z, kv_head, dk) + int64_t{token} * dk;
  if (token >= piece.len) {
    for (int i = lane; i < dk / 8; i += 32) reinterpret_cast<Chunk*>(to)[i] = {};
    return;
  }
  const GlobalRow<T> row{row_of<T>(p.k, piece.batch, piece.first + token, kv_head), to};
  rotate_row<32>(row, dk, p.rope,
                 position_of(p.rope, piece.batch, piece.first + token, piece.position + token),
                 p.status, lane);
}

}  // namespace infini

INFINI_TYPE(rotate_keys, InfiniRotateKeys)
