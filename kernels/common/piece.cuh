// Rows of a piece's segment, and rows of tensors.
#pragma once

#include "common/tile.cuh"
#include "params.h"

namespace infini {

// Row of a tensor.
template <class T>
__device__ __forceinline__ T* row_of(const InfiniTensor& t, int64_t batch, int64_t token,
                                     int64_t head) {
  return pointer<T>(t.data) + batch * t.batch + token * t.token + head * t.head;
}

// Where a head's rows begin in [index][Hkv][N][columns]: open segments, rotated keys.
template <class T>
__device__ __forceinline__ T* segment_rows(uint64_t address, const InfiniProblem& p, int index,
                                           int kv_head, int columns) {
  return pointer<T>(address) + (int64_t{index} * p.kv_heads + kv_head) * p.segment_len * columns;
}

// Values of a piece's segment.
template <class T>
__device__ __forceinline__ SegmentRows<T> values_of(const InfiniProblem& p, const InfiniTensor& v,
                                                    const InfiniState& state,
                                                    const InfiniPiece& piece, int kv_head) {
  return {{segment_rows<T>(state.open_v, p, piece.slot, kv_head, p.value_dim), p.value_dim},
          {row_of<T>(v, piece.batch, piece.first, kv_head), v.token},
          piece.cached};
}

// Unrotated keys of a piece's segment.
template <class T>
__device__ __forceinline__ SegmentRows<T> keys_of(const InfiniProblem& p, const InfiniTensor& k,
                                                  const InfiniState& state,
                                                  const InfiniPiece& piece, int kv_head) {
  return {{segment_rows<T>(state.open_k, p, piece.slot, kv_head, p.key_dim), p.key_dim},
          {row_of<T>(k, piece.batch, piece.first, kv_head), k.token},
          piece.cached};
}

}  // namespace infini
