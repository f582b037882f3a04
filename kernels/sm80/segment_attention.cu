// Phase 5 of prefill: local attention, retrieval and gate of every piece, segments in parallel.
//
// Tile: AttentionTile<Dk, Dv>: 128 query rows (64 at Dv = 256) of one query head, 64 keys per
// block (128 at d = 64), 4 warps; two blocks per SM. One-dimensional grid in the order of
// common/schedule.cuh; with a_mem asked, as many blocks again write the memory branch alone.
//
// Shared memory: query, key, value tile; z [Dk]; row weights. Barriers: __syncthreads only, two per
// block of keys (common/attention.cuh).
//
// Per tile of R rows at key n (on average N/2): 4 R n D flops of the local branch and 2 R Dk Dv of
// the retrieval; reads R Dk + n (Dk + Dv) + Dk Dv elements, all but the queries mostly from L2.
#include "common/instantiate.h"
#include "common/schedule.cuh"
#include "common/segment_tile.cuh"

namespace infini {

template <class T, int Dk, int Dv>
__device__ __forceinline__ void segment_attention(const InfiniSegmentAttention& p,
                                                  unsigned char* shared) {
  constexpr int kRows = AttentionTile<Dk, Dv>::rows;
  __shared__ SegmentTask<T> task;
  {
    const TilePlace place = tile_place(p, kRows, blockIdx.x);
    const int index = place.piece, kv_head = place.kv_head, first = place.first;
    const InfiniPiece& piece = pointer<const InfiniPiece>(p.run.pieces)[index];
    if (first >= piece.len) return;

    if (threadIdx.x == 0) {
      task.source = {keys_of<T>(p.problem, p.call.k, p.state, piece, kv_head),
                     values_of<T>(p.problem, p.call.v, p.state, piece, kv_head)};
      if (p.call.rope.rows > 0) {
        const uint64_t open = p.state.open_k_rotated;
        task.source.k = {{segment_rows<T>(open, p.problem, piece.slot, kv_head, Dk), Dk},
                         {segment_rows<T>(p.rotated, p.problem, index, kv_head, Dk), Dk},
                         piece.cached};
      }
      const int64_t record = int64_t{index} * p.problem.kv_heads + kv_head;
      task.memory = {pointer<const T>(p.snapshot) + record * (Dk * Dv),
                     pointer<const float>(p.snapshot_scale) + record * (Dv / 32),
                     pointer<const float>(p.z) + record * Dk};
      task.piece = piece;
      task.rope = p.call.rope;
      task.token = piece.first + first;
      task.first = first;
      task.rows = min(kRows, piece.len - first);
      task.head = place.head;
      task.branch = place.memory ? Branch::kMemory : Branch::kBoth;
    }
  }
  __syncthreads();
  segment_tile<false, T, Dk, Dv>(p.problem, p.call, task, p.state.status, shared);
}

}  // namespace infini

#define INFINI_INSTANCE(dk, dv) \
  INFINI_HEAD(segment_attention, InfiniSegmentAttention, AttentionTile, dk, dv)
INFINI_HEAD_DIMS(INFINI_INSTANCE)
