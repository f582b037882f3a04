// One segment (or less) of every sequence in one launch: attention of the new tokens, and where
// they complete the segment, the update of the memory.
//
// Grid (blocks, sequences). Of a sequence's blocks the first `tiles` * Hq (twice that with a_mem
// asked) each attend one query tile (AttentionTile, common/attention.cuh), the others each update
// with `chunk_len` tokens and 32 or 64 columns of V (UpdateTile, common/update.cuh); both read the
// memory as it was. The last block of a KV head, known by a ticket that all of them take, adds the
// partial updates in index order and writes M, z and the snapshot in place; the last head moves the
// counters. Tokens that leave the segment open are appended by the blocks of a group's first query
// head.
//
// Shared memory: the larger of the two tiles. Barriers: __syncthreads; tickets in global memory, 0
// between launches.
//
// Flops and bytes: those of segment_attention and commit; K and V are read once from DRAM, again
// from L2 by every query tile and by the update.
#include "common/instantiate.h"
#include "common/open_rows.cuh"
#include "common/segment_tile.cuh"
#include "common/update_block.cuh"

namespace infini {

template <class T, int Dk, int Dv>
struct Segment {
  static constexpr int kThreads = SegmentTile<Dk, Dv>::threads;
  static constexpr int kRows = AttentionTile<Dk, Dv>::rows;
  static constexpr int kColumns = kSegmentColumns<Dv>, kKeys = kSegmentKeys<Dk>;
  static constexpr int kSlices = SegmentTile<Dk, Dv>::slices;

  static __device__ __forceinline__ int64_t matrix(const InfiniSegment& p, const InfiniPiece& piece,
                                                   int kv_head) {
    return int64_t{piece.slot} * p.problem.kv_heads + kv_head;
  }

  // Attention block `id` of a sequence.
  static __device__ __forceinline__ void attend(const InfiniSegment& p, SegmentTask<T>& task,
                                                int id, unsigned char* shared) {
    const InfiniPiece& piece = task.piece;
    const int heads = p.problem.heads, blocks = p.tiles * heads;
    const bool second = id >= blocks;
    const int head = id % heads, first = (p.tiles - 1 - id % blocks / heads) * kRows;
    if (first >= piece.len) return;
    const int kv_head = task.kv_head;
    if (!second && !piece.full && head % p.problem.group == 0) {
      append_tokens<kThreads, T>(p.problem, p.call, p.state, piece, kv_head, first,
                                 min(first + kRows, piece.len));
    }
    if (threadIdx.x == 0) {
      task.source = {keys_of<T>(p.problem, p.call.k, p.state, piece, kv_head),
                     values_of<T>(p.problem, p.call.v, p.state, piece, kv_head)};
      if (p.call.rope.rows > 0) {
        const uint64_t open = p.state.open_k_rotated;
        task.source.k.open.data = segment_rows<T>(open, p.problem, piece.slot, kv_head, Dk);
      }
      const int64_t at = matrix(p, piece, kv_head);
      task.memory = {pointer<const T>(p.state.snapshot) + at * (Dk * Dv),
                     pointer<const float>(p.state.snapshot_scale) + at * (Dv / 32),
                     pointer<const float>(p.state.normalizer) + at * Dk};
      task.rope = p.call.rope;
      task.token = piece.first + first;
      task.first = first;
      task.rows = min(kRows, piece.len - first);
      task.head = head;
      task.branch = second ? Branch::kMemory : Branch::kBoth;
    }
    __syncthreads();
    segment_tile<true, T, Dk, Dv>(p.problem, p.call, task, p.state.status, shared);
  }

  // Update block `id` of a sequence.
  static __device__ __forceinline__ void update(const InfiniSegment& p, const SegmentTask<T>& task,
                                                int id, unsigned char* shared) {
    const InfiniPiece& piece = task.piece;
    const int kv_head = task.kv_head, chunk = id / kSlices / p.problem.kv_heads;
    const int first = chunk * p.chunk_len, end = min(first + p.chunk_len, p.problem.segment_len);
    if (!piece.full || piece.len == 0 || first >= end) return;
    __shared__ UpdateTask<T> update;
    if (threadIdx.x == 0) {
      const int slice = id % kSlices;
      const int64_t head = int64_t{blockIdx.y} * p.problem.kv_heads + kv_head;
      update = {{keys_of<T>(p.problem, p.call.k, p.state, piece, kv_head),
                 values_of<T>(p.problem, p.call.v, p.state, piece, kv_head)},
                matrix(p, piece, kv_head),
                partial_of<Dk, Dv>(p.exchange, head, p.chunks, chunk),
                first,
                end,
                slice % (Dv / kColumns) * kColumns,
                slice / (Dv / kColumns) * kKeys,
                piece.empty != 0};
    }
    __syncthreads();
    update_block<kThreads, T, Dk, Dv, kColumns, kKeys>(p.problem, p.state, update, shared);
  }

  // What the last blocks do, after everything.
  static __device__ __forceinline__ void finish(const InfiniSegment& p,
                                                const SegmentTask<T>& task) {
    const InfiniPiece& piece = task.piece;
    const int kv_head = task.kv_head, copies = p.call.a_mem.data ? 2 : 1;
    const uint32_t blocks = copies * p.tiles * p.problem.group + p.chunks * kSlices;
    const int64_t head = int64_t{blockIdx.y} * p.problem.kv_heads + kv_head;
    if (!last_block(pointer<uint32_t>(p.exchange.head_tickets) + head, blocks)) return;
    if (piece.full && piece.len > 0) {
      finish_memory<kThreads, T, Dk, Dv>(p.state, matrix(p, piece, kv_head), piece.empty,
                                         partial_of<Dk, Dv>(p.exchange, head, p.chunks, 0),
                                         (p.problem.segment_len + p.chunk_len - 1) / p.chunk_len);
    }
    if (!last_block(pointer<uint32_t>(p.exchange.sequence_tickets) + blockIdx.y,
                    p.problem.kv_heads)) {
      return;
    }
    if (threadIdx.x == 0 && piece.len > 0) {
      advance_counters(p.problem, p.state, piece, p.call.rope.rows > 0);
    }
  }
};

template <class T, int Dk, int Dv>
__device__ __forceinline__ void segment(const InfiniSegment& p, unsigned char* shared) {
  using Block = Segment<T, Dk, Dv>;
  __shared__ SegmentTask<T> task;
  const int attention = (p.call.a_mem.data ? 2 : 1) * p.tiles * p.problem.heads;
  const int id = blockIdx.x;
  if (threadIdx.x == 0) {
    const InfiniSequence s = sequence_of(p.sequences, blockIdx.y);
    task.piece = piece_of(p.problem, p.state, p.call.rope, p.sequences, s, 0);
    if (task.piece.len > 0 && (task.piece.len < s.len || (task.piece.full && p.chunks == 0))) {
      report(p.state.status, INFINI_STATUS_LENGTH);
      task.piece.len = 0;
    }
    task.kv_head = id < attention ? id % p.problem.heads / p.problem.group
                                  : (id - attention) / Block::kSlices % p.problem.kv_heads;
  }
  __syncthreads();
  if (id < attention) {
    Block::attend(p, task, id, shared);
  } else {
    Block::update(p, task, id - attention, shared);
  }
  Block::finish(p, task);
}

}  // namespace infini

#define INFINI_INSTANCE(dk, dv) INFINI_HEAD(segment, InfiniSegment, SegmentTile, dk, dv)
INFINI_HEAD_DIMS(INFINI_INSTANCE)
