// The producer of the attention kernels: one warp that keeps the rings full.
#pragma once

#include "sm90/attention_shared.cuh"

namespace infini {

template <class T, int Dk, int Dv, int QueryStages>
struct AttentionProducer {
  using Shared = AttentionShared<T, Dk, Dv, QueryStages>;
  static constexpr int kStages = Shared::kStages, kKeys = Shared::kKeys;

  const ptx::TensorMap* maps;
  Shared shared;
  Cursor<QueryStages> query;  // of all groups
  Cursor<kStages> key, value;
  Cursor<Shared::kJobs> jobs;
  TailCleaner<kStages> tail{shared.tail()};

  static __device__ __forceinline__ bool leader() { return threadIdx.x % 32 == 0; }

  __device__ __forceinline__ void load_queries(const InfiniCall& call, const AttentionJob& job) {
#pragma unroll
    for (int group = 0; group < Shared::kGroups; ++group) {
      const Ring<QueryStages> ring = shared.query_ring(group);
      ring.acquire(query);
      if (leader()) {
        const uint32_t full = ring.full(query.stage());
        ptx::mbarrier_arrive_expect_tx(full, Shared::QueryTile::bytes);
        const Box box = job.row_box(call.q, group * 64);
        shared.queries(group, query.stage()).load(&maps[kMapQ], box, full);
      }
    }
    query.advance();
  }

  static __device__ __forceinline__ Box block_box(const AttentionJob& job, const KeyBlock& block,
                                                  Box fresh) {
    if (block.open) return {0, job.kv_head, block.start, job.piece.slot};
    fresh.row += block.start;
    return fresh;
  }

  __device__ __forceinline__ void load_keys(AttentionMap map, const Box& box) {
    const Ring<kStages> ring = shared.key_ring();
    ring.acquire(key);
    if (leader()) {
      const uint32_t full = ring.full(key.stage());
      ptx::mbarrier_arrive_expect_tx(full, Shared::KeyTile::bytes);
      shared.keys(key.stage()).load_for(shared.shared_by, &maps[map], box, full);
    }
    key.advance();
  }

  // Rows from `valid` on do not belong to the segment.
  __device__ __forceinline__ void load_values(AttentionMap map, const Box& box, int valid) {
    const Ring<kStages> ring = shared.value_ring();
    const auto tile = shared.values(value.stage());
    ring.acquire(value);
    tail.fill(ring, value, tile.bytes, tile, valid,
              [&](uint32_t full) { tile.load_for(shared.shared_by, &maps[map], box, full); });
    value.advance();
  }

  __device__ __forceinline__ void load_keys(const AttentionJob& job, const KeyBlock& block) {
    load_keys(block.open ? kMapOpenK : kMapK, block_box(job, block, job.k));
  }

  __device__ __forceinline__ void load_values(const AttentionJob& job, const KeyBlock& block) {
    load_values(block.open ? kMapOpenV : kMapV, block_box(job, block, job.v), block.valid);
  }

  __device__ __forceinline__ void load_memory(const AttentionJob& job) {
    const Ring<kStages> ring = shared.value_ring();
#pragma unroll 1
    for (int row = 0; row < Dk; row += Shared::kMemoryRows) {
      ring.acquire(value);
      if (leader()) {
        const uint32_t full = ring.full(value.stage());
        Box box = job.snapshot;
        box.row += row;
        ptx::mbarrier_arrive_expect_tx(full, Shared::MemoryTile::bytes);
        shared.memory(value.stage()).load_for(shared.shared_by, &maps[kMapSnapshot], box, full);
      }
      value.advance();
    }
  }

  // Hands a job to the consumers, as `fill(job)` writes it, and feeds them everything it needs, in
  // the order in which they ask for it. False after the last, the empty one.
  template <class Fill>
  __device__ __forceinline__ bool feed(const InfiniCall& call, Fill fill) {
    const Ring<Shared::kJobs> ring = shared.job_ring();
    AttentionJob& job = shared.job(jobs.stage());
    ring.acquire(jobs);
    if (leader()) {
      fill(job);
      ptx::mbarrier_arrive(ring.full(jobs.stage()));
    }
    __syncwarp();
    jobs.advance();
    if (job.rows == 0) return false;
    load(call, job);
    return true;
  }

  __device__ __forceinline__ void load(const InfiniCall& call, const AttentionJob& job) {
    const KeyBlocks& blocks = job.blocks;
    if (job.attends) load_keys(job, blocks.at<kKeys>(0));
    load_queries(call, job);
    if (job.attends) {
#pragma unroll 1
      for (int i = 0; i < blocks.count; ++i) {
        if (i + 1 < blocks.count) load_keys(job, blocks.at<kKeys>(i + 1));
        load_values(job, blocks.at<kKeys>(i));
      }
      if (job.reloads) load_queries(call, job);
    }
    if (job.retrieves) load_memory(job);
  }
};

}  // namespace infini
