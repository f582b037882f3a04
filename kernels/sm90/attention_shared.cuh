// Shared memory of the attention kernels, from the start of dynamic shared memory:
//
//   query ring   [stages][groups][64 x Dk]  by tensor copies; rotated, then staging of the outputs
//   key ring     [stages][keys x Dk]
//   value ring   [stages][keys x Dv]    after the last values: blocks of M's snapshot
//   mbarriers    rings of queries, keys, values and jobs (full, empty); those of tails
//   jobs         [2]
#pragma once

#include "sm90/attention_job.cuh"
#include "sm90/pipeline.cuh"
#include "sm90/tiles.h"

namespace infini {

template <class T, int Dk, int Dv, int QueryStages>
struct AttentionShared {
  using Shape = GroupAttentionTile<Dk, Dv, QueryStages>;
  static constexpr int kGroups = Shape::groups, kKeys = Shape::keys, kStages = Shape::stages;
  static constexpr int kMemoryRows = kKeys < Dk ? kKeys : Dk;

  using QueryTile = SwizzledTile<T, 64, Dk>;
  using KeyTile = SwizzledTile<T, kKeys, Dk>;
  using ValueTile = SwizzledTile<T, kKeys, Dv>;
  using MemoryTile = SwizzledTile<T, kMemoryRows, Dv>;
  using OutputStage = Stage<T, 64, Dv>;
  static_assert(Dv <= Dk, "outputs are staged where the queries lay");

  static constexpr int kKeysAt = QueryStages * kGroups * QueryTile::bytes;
  static constexpr int kValuesAt = kKeysAt + kStages * KeyTile::bytes;
  static constexpr int kBarriersAt = kValuesAt + kStages * ValueTile::bytes;
  static_assert(kBarriersAt == Shape::tile_bytes);
  static constexpr int kJobs = 2;
  static constexpr int kJobsAt = kBarriersAt + 192;

  int shared_by = 1;  // blocks of a cluster that share keys, values and memory: see Ring
  uint32_t base = ptx::shared_address(dynamic_shared());

  __device__ __forceinline__ QueryTile queries(int group, int stage = 0) const {
    return {base + (stage * kGroups + group) * QueryTile::bytes};
  }
  __device__ __forceinline__ KeyTile keys(int stage) const {
    return {base + kKeysAt + stage * KeyTile::bytes};
  }
  __device__ __forceinline__ ValueTile values(int stage) const {
    return {base + kValuesAt + stage * ValueTile::bytes};
  }
  __device__ __forceinline__ MemoryTile memory(int stage) const {
    return {base + kValuesAt + stage * ValueTile::bytes};
  }
  __device__ __forceinline__ Ring<QueryStages> query_ring(int group) const {
    return {base + kBarriersAt + group * Ring<QueryStages>::bytes};
  }
  __device__ __forceinline__ Ring<kStages> key_ring() const {
    return {base + kBarriersAt + kGroups * Ring<QueryStages>::bytes, shared_by};
  }
  __device__ __forceinline__ Ring<kStages> value_ring() const {
    return {key_ring().barriers + Ring<kStages>::bytes, shared_by};
  }
  __device__ __forceinline__ Ring<kJobs> job_ring() const {
    return {value_ring().barriers + Ring<kStages>::bytes};
  }
  // Of the producer's TailCleaner.
  __device__ __forceinline__ uint32_t tail() const {
    return job_ring().barriers + Ring<kJobs>::bytes;
  }
  static_assert(kGroups * Ring<QueryStages>::bytes + 2 * Ring<kStages>::bytes + Ring<kJobs>::bytes +
                    TailCleaner<kStages>::bytes <=
                192);

  __device__ __forceinline__ AttentionJob& job(int stage) const {
    return reinterpret_cast<AttentionJob*>(dynamic_shared() + kJobsAt)[stage];
  }
  static_assert(kJobsAt + kJobs * sizeof(AttentionJob) <= Shape::shared_bytes);

  // By one thread; the block synchronises afterwards.
  __device__ __forceinline__ void init() const {
    for (int group = 0; group < kGroups; ++group) query_ring(group).init(4);
    key_ring().init(4 * kGroups);
    value_ring().init(4 * kGroups);
    job_ring().init(4 * kGroups);
    TailCleaner<kStages>{tail()}.init();
    ptx::fence_mbarrier_init();
  }
};

// Named barriers; 0 is that of __syncthreads.
constexpr int kTurnBarrier = 1;      // + group: the group may issue its products
constexpr int kGroupBarrier = 5;     // + group: the warps of a group meet
constexpr int kConsumerBarrier = 9;  // the consumers of the block meet

}  // namespace infini
