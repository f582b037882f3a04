// New tokens into the open segment: keys as given, rotated, and values.
#pragma once

#include "common/piece.cuh"
#include "common/rotate.cuh"

namespace infini {

template <int Lanes, class T>
__device__ __forceinline__ void copy_row(T* to, const T* from, int columns, int lane) {
  for (int i = lane; i < columns / 8; i += Lanes) {
    reinterpret_cast<Chunk*>(to)[i] = reinterpret_cast<const Chunk*>(from)[i];
  }
}

// Tokens `first` to `end` of a piece that leaves its segment open, by the warps of the block.
template <int Threads, class T>
__device__ __forceinline__ void append_tokens(const InfiniProblem& p, const InfiniCall& call,
                                              const InfiniState& state, const InfiniPiece& piece,
                                              int kv_head, int first, int end) {
  const int lane = threadIdx.x % 32, dk = p.key_dim, dv = p.value_dim;
  for (int token = first + threadIdx.x / 32; token < end; token += Threads / 32) {
    const int64_t row = piece.cached + token, from = piece.first + token;
    const T* k = row_of<const T>(call.k, piece.batch, from, kv_head);
    copy_row<32>(segment_rows<T>(state.open_k, p, piece.slot, kv_head, dk) + row * dk, k, dk, lane);
    copy_row<32>(segment_rows<T>(state.open_v, p, piece.slot, kv_head, dv) + row * dv,
                 row_of<const T>(call.v, piece.batch, from, kv_head), dv, lane);
    if (call.rope.rows > 0) {
      T* to = segment_rows<T>(state.open_k_rotated, p, piece.slot, kv_head, dk) + row * dk;
      rotate_row<32>(GlobalRow<T>{k, to}, dk, call.rope,
                     position_of(call.rope, piece.batch, from, piece.position + token),
                     state.status, lane);
    }
  }
}

}  // namespace infini
