// Phase 5 of prefill on Hopper: local attention, retrieval and gate of every piece.
//
// Tile: GroupAttentionTile<Dk, Dv>: 128 query rows of one query head, 64 per consumer warpgroup;
// blocks of 128 keys (64 at d = 256). A producer warp keeps the rings full
// (attention_producer.cuh), the consumers multiply and weigh (attention_consumer.cuh). Persistent
// blocks, one per SM, in the order of common/schedule.cuh; pairs of blocks (clusters) share what
// neighbouring heads both read.
//
// Shared memory, mbarriers and named barriers: attention_shared.cuh; docs/segment_attention.md has
// them in tables. Cluster barriers: after the mbarriers are initialised, and at the end.
//
// Per tile that sees n keys: 4 * 128 n D flops of the local branch and 2 * 128 Dk Dv of the
// retrieval, all wgmma; reads 128 Dk + (n (Dk + Dv) + Dk Dv) / 2 elements of a pair's share, all
// but the queries mostly from L2.
#include "common/schedule.cuh"
#include "sm90/attention_consumer.cuh"
#include "sm90/attention_producer.cuh"
#include "sm90/instantiate.h"

namespace infini {

// The tile of number `id`, if the piece is that long.
template <int Dk, int Dv>
__device__ __forceinline__ void find_job(const InfiniSegmentAttention& p, int id,
                                         AttentionJob& job) {
  constexpr int kRows = GroupAttentionTile<Dk, Dv>::rows;
  const TilePlace place = tile_place(p, kRows, id);
  const InfiniPiece& piece = pointer<const InfiniPiece>(p.run.pieces)[place.piece];
  if (place.first >= piece.len) return;
  job.piece = piece;
  job.head = place.head;
  job.kv_head = place.kv_head;
  job.first = place.first;
  job.rows = min(kRows, piece.len - place.first);
  job.memory = place.memory;
  job.blocks.template set<GroupAttentionTile<Dk, Dv>::keys>(piece, job.first, job.rows);
  job.weigh_branches(p.problem, p.call, p.shared_by);
  const int token = static_cast<int>(piece.first);
  job.v = {0, place.kv_head, token, job.batch_of(p.call.v)};
  job.k = job.rotates ? Box{0, place.kv_head, 0, place.piece}
                      : Box{0, place.kv_head, token, job.batch_of(p.call.k)};
  job.snapshot = {0, place.kv_head, 0, place.piece};
  const int64_t record = int64_t{place.piece} * p.problem.kv_heads + place.kv_head;
  job.z = pointer<const float>(p.z) + record * Dk;
  job.scale = pointer<const float>(p.snapshot_scale) + record * (Dv / 32);
}

template <class T, int Dk, int Dv>
__device__ __forceinline__ void segment_attention(const ptx::TensorMap* maps,
                                                  const InfiniSegmentAttention& p) {
  using Shape = GroupAttentionTile<Dk, Dv>;
  constexpr int kStages = Shape::query_stages;
  const AttentionShared<T, Dk, Dv, kStages> shared{p.shared_by};
  if (threadIdx.x == 0) shared.init();
  ptx::meet_cluster();
  if (threadIdx.x >= 128 * Shape::groups) {
    ptx::setmaxnreg_dec<Shape::producer_registers>();
    if (threadIdx.x % 128 < 32) {
      AttentionProducer<T, Dk, Dv, kStages> producer{maps, shared};
      const int tiles = tile_count(p);
      int id = blockIdx.x;
      const auto next = [&](AttentionJob& job) {
        job.rows = 0;
        for (; id < tiles && job.rows == 0; id += gridDim.x) find_job<Dk, Dv>(p, id, job);
      };
      while (producer.feed(p.call, next)) {
      }
    }
  } else {
    ptx::setmaxnreg_inc<Shape::consumer_registers>();
    AttentionConsumer<T, Dk, Dv, kStages> consumer{{maps, shared}};
    consumer.group.start_turns();
    while (consumer.run(p.problem, p.call, p.state.status)) {
    }
    consumer.group.end_turns();
  }
  ptx::meet_cluster();  // nobody copies to this block, or arrives at its barriers, any more
}

}  // namespace infini

#define INFINI_INSTANCE(dk, dv)                                                       \
  INFINI_SM90_HEAD(segment_attention, InfiniSegmentAttention, infini::kAttentionMaps, \
                   GroupAttentionTile, dk, dv)
INFINI_SM90_HEAD_DIMS(INFINI_INSTANCE)
