// Slots of a pool of states become copies of slots of the same or another pool.
//
// Tile: none; a thread copies 4 chunks of 16 bytes at a time. Grid (blocks, Hkv, pairs): the blocks
// of a pair and KV head share its parts, each of which is contiguous: memory, normaliser, snapshot,
// scales, and of the open segment the rows in use, whose number is read from the source's counters.
//
// Shared memory: none.
//
// Reads and writes 4 (Dk Dv + Dk) + 2 Dk Dv + Dv / 8 bytes per pair and KV head, and 2 (Dk + Dv), or
// with rotated keys 2 (2 Dk + Dv), per token of its open segment.
#include "common/instantiate.h"
#include "common/sequence.cuh"

namespace infini {

// What one block copies of a part: `used` units of those that a (slot, KV head) has `room` for.
template <class Unit>
__device__ __forceinline__ void copy_part(uint64_t to, uint64_t from, int64_t to_head,
                                          int64_t from_head, int64_t room, int64_t used) {
  constexpr int kEach = 4;
  Unit* into = pointer<Unit>(to) + to_head * room;
  const Unit* of = pointer<const Unit>(from) + from_head * room;
  const int64_t step = int64_t{gridDim.x} * kEach * kElementThreads;
  const int64_t first = int64_t{blockIdx.x} * kEach * kElementThreads + threadIdx.x;
#pragma unroll 1
  for (int64_t start = first; start < used; start += step) {
    Unit x[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (start + i * kElementThreads < used) x[i] = of[start + i * kElementThreads];
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (start + i * kElementThreads < used) into[start + i * kElementThreads] = x[i];
    }
  }
}

__device__ __forceinline__ void copy_slots(const InfiniCopySlots& p, unsigned char*) {
  const InfiniProblem& problem = p.problem;
  const InfiniSlotPair pair = pointer<const InfiniSlotPair>(p.pairs)[blockIdx.z];
  const InfiniCounters counters = pointer<const InfiniCounters>(p.from.counters)[pair.from];
  const bool rotated = counters.open_len > 0 && counters.rotated != 0;
  if (counters.open_len > static_cast<uint32_t>(problem.segment_len)) {
    report(p.to.status, INFINI_STATUS_LENGTH);
    return;
  }
  if (rotated && (!p.from.open_k_rotated || !p.to.open_k_rotated)) {
    report(p.to.status, INFINI_STATUS_ROTATION);
    return;
  }
  const int64_t from = int64_t{pair.from} * problem.kv_heads + blockIdx.y;
  const int64_t to = int64_t{pair.to} * problem.kv_heads + blockIdx.y;
  const int64_t dk = problem.key_dim, dv = problem.value_dim, n = problem.segment_len;
  const int64_t open = counters.open_len;
  const auto chunks = [&](uint64_t into, uint64_t of, int64_t room, int64_t used) {
    copy_part<Chunk>(into, of, to, from, room / 16, used / 16);
  };
  chunks(p.to.memory, p.from.memory, 4 * dk * dv, 4 * dk * dv);
  chunks(p.to.normalizer, p.from.normalizer, 4 * dk, 4 * dk);
  chunks(p.to.snapshot, p.from.snapshot, 2 * dk * dv, 2 * dk * dv);
  const int64_t scales = dv / INFINI_SCALE_COLUMNS;
  copy_part<float>(p.to.snapshot_scale, p.from.snapshot_scale, to, from, scales, scales);
  chunks(p.to.open_k, p.from.open_k, 2 * n * dk, 2 * open * dk);
  chunks(p.to.open_v, p.from.open_v, 2 * n * dv, 2 * open * dv);
  if (rotated) chunks(p.to.open_k_rotated, p.from.open_k_rotated, 2 * n * dk, 2 * open * dk);
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) {
    pointer<InfiniCounters>(p.to.counters)[pair.to] = counters;
  }
}

}  // namespace infini

INFINI_KERNEL(infini_copy_slots_sm80, copy_slots, InfiniCopySlots, infini::kElementThreads, 1)
