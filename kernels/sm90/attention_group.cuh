// A consumer warpgroup of the attention kernels: where it stands in the rings, its 64 query rows
// with their output and running softmax in registers, and its turn to multiply.
#pragma once

#include "common/rotate.cuh"
#include "sm90/attention_shared.cuh"
#include "sm90/attention_softmax.cuh"

namespace infini {

template <class T, int Dk, int Dv, int QueryStages>
struct AttentionGroup {
  using Element = T;
  using Shared = AttentionShared<T, Dk, Dv, QueryStages>;
  using Softmax = GroupSoftmax<T, Shared::kKeys>;
  static constexpr int kGroups = Shared::kGroups;
  static constexpr int kKeyDim = Dk, kValueDim = Dv;

  const ptx::TensorMap* maps;
  Shared shared;
  Cursor<QueryStages> query;
  Cursor<Shared::kStages> key, value;
  Cursor<Shared::kJobs> jobs;

  // Row h of a thread is row `row(h)` of the group's 64.
  float o[Dv / 2];
  Softmax softmax;

  __device__ __forceinline__ void start() {
#pragma unroll
    for (float& x : o) x = 0.0f;
    softmax.start();
  }

  __device__ __forceinline__ void rescale(const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < Dv / 2; ++i) o[i] *= factor[i / 2 % 2];
  }

  // What all lanes agree on and a shuffle says so stays in uniform registers, where the operands of
  // wgmma are built. (Above Dv = 128 no register is to spare for it.)
  const int uniform_index = uniform(threadIdx.x / 128);

  static __device__ __forceinline__ uint32_t uniform(uint32_t x) {
    return __shfl_sync(0xffffffff, x, 0);
  }
  __device__ __forceinline__ int index() const {
    return Dv > 128 ? ptx::tid_x() / 128 : uniform_index;
  }
  static __device__ __forceinline__ int warp_row() { return ptx::tid_x() / 32 % 4 * 16; }
  static __device__ __forceinline__ int row(int h) {
    return warp_row() + ptx::tid_x() % 32 / 4 + h * 8;
  }
  // The same of the tile.
  __device__ __forceinline__ int tile_row(int h) const { return index() * 64 + row(h); }

  // ---- queries

  uint32_t query_base;
  __device__ __forceinline__ typename Shared::QueryTile queries() const {
    if (QueryStages == 1) return shared.queries(index());
    return {query_base};
  }
  __device__ __forceinline__ void wait_queries() {
    if (QueryStages > 1) query_base = uniform(shared.queries(index(), query.stage()).base);
    shared.query_ring(index()).wait(query);
  }

  // In place.
  __device__ __forceinline__ void rotate_queries(const InfiniCall& call, const AttentionJob& job,
                                                 uint64_t status) const {
    const InfiniPiece& piece = job.piece;
    const int skip = job.first + index() * 64;
    rotate_tile<128>(
        queries(), 0, max(0, min(64, job.rows - index() * 64)), call.rope, status,
        [&](int r) {
          return position_of(call.rope, piece.batch, piece.first + skip + r,
                             piece.position + skip + r);
        },
        threadIdx.x % 128);
    ptx::fence_proxy_async_shared();
    ptx::bar_sync(kGroupBarrier + index(), 128);
  }

  // ---- keys and values

  __device__ __forceinline__ void release_keys() {
    shared.key_ring().release(key);
    key.advance();
  }
  __device__ __forceinline__ void release_values() {
    shared.value_ring().release(value);
    value.advance();
  }

  // ---- turns

  __device__ __forceinline__ void take_turn() const { ptx::bar_sync(kTurnBarrier + index(), 256); }
  __device__ __forceinline__ void pass_turn() const {
    ptx::bar_arrive(kTurnBarrier + (index() + 1) % kGroups, 256);
  }
  // Before the first turn: as if the last group had passed it.
  __device__ __forceinline__ void start_turns() const {
    if (index() == kGroups - 1) pass_turn();
  }
  // After the last: what the last group has passed.
  __device__ __forceinline__ void end_turns() const {
    if (index() == 0) take_turn();
  }
};

}  // namespace infini
