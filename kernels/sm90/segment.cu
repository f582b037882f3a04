// One segment (or less) of every sequence in one launch, on Hopper: a cluster has a sequence's KV
// head to itself.
//
// Grid (Hkv * cluster, sequences), cluster (blocks, 1, 1) with as many blocks as a segment has
// update chunks. Its blocks
//   1. rotate the new keys into the workspace, where the call rotates; barrier of the cluster
//   2. attend the tiles of all query heads of the group, the longest first, in turns; as
//      segment_attention does (attention_*.cuh)
//   3. where the segment is complete, update with one chunk each (memory_update.cuh); barrier
//   4. add up: 32 columns of M each, through distributed shared memory; M, z and the snapshot in
//      place, which nobody reads any more; barrier
//   5. else append the new tokens to the open segment, after a barrier: nobody reads it any more
// The first block of the last cluster of a sequence, known by a ticket, moves the counters.
//
// Shared memory: that of attention, then the vectors of the update. Barriers: those of attention;
// kConsumerBarrier; of the cluster one to rotate and two per pass of the update (two passes at
// Dv = 256), or one to append.
//
// Flops and bytes: those of segment_attention and of the update; K and V are read once from device
// memory, again from L2 by every query tile and by the update. dM never leaves the cluster.
#include "common/open_rows.cuh"
#include "common/sequence.cuh"
#include "sm90/attention_consumer.cuh"
#include "sm90/attention_producer.cuh"
#include "sm90/instantiate.h"
#include "sm90/memory_update.cuh"

namespace infini {

template <class T, int Dk, int Dv>
struct Segment {
  using Shape = GroupSegmentTile<Dk, Dv>;
  using Shared = UpdateShared<T, Dk, Dv>;
  static constexpr int kThreads = Shared::kThreads;

  const ptx::TensorMap* maps;
  const InfiniSegment& p;
  Shared shared;

  static __device__ __forceinline__ int rank() { return ptx::cluster_ctarank(); }
  static __device__ __forceinline__ int blocks() { return ptx::cluster_nctarank(); }
  static __device__ __forceinline__ const InfiniPiece& piece() { return Shared::piece(); }
  __device__ __forceinline__ int kv_head() const { return blockIdx.x / blocks(); }
  __device__ __forceinline__ bool updates() const { return piece().full != 0; }

  // The piece of the cluster's sequence, of length 0 when there is nothing to do, and the block's
  // chunk; by one thread.
  __device__ __forceinline__ void find_work() const {
    const InfiniSequence s = sequence_of(p.sequences, blockIdx.y);
    InfiniPiece piece = piece_of(p.problem, p.state, p.call.rope, p.sequences, s, 0);
    if (piece.len > 0 && (piece.len < s.len || (piece.full && p.chunks == 0))) {
      report(p.state.status, INFINI_STATUS_LENGTH);
      piece.len = 0;
    }
    Shared::piece() = piece;
    const int first = min(rank() * p.chunk_len, p.problem.segment_len);
    const int64_t matrix = int64_t{piece.slot} * p.problem.kv_heads + kv_head();
    Shared::chunk() = {kv_head(), first, min(first + p.chunk_len, p.problem.segment_len),
                       p.problem.delta && !piece.empty, matrix};
  }

  // New keys, rotated, a warp per token; zeros behind them, up to the end of the last block of
  // keys.
  __device__ __forceinline__ void rotate_keys() const {
    const int rows = (piece().len + Shape::keys - 1) / Shape::keys * Shape::keys;
    T* to = segment_rows<T>(p.rotated, p.problem, blockIdx.y, kv_head(), Dk);
    const int lane = threadIdx.x % 32, step = blocks() * (Shape::threads / 32);
    for (int token = rank() * (Shape::threads / 32) + threadIdx.x / 32;
         token < min(rows, p.problem.segment_len); token += step) {
      T* row = to + int64_t{token} * Dk;
      if (token >= piece().len) {
        for (int i = lane; i < Dk / 8; i += 32) reinterpret_cast<Chunk*>(row)[i] = {};
        continue;
      }
      const int64_t from = piece().first + token;
      const GlobalRow<T> pair{row_of<T>(p.call.k, piece().batch, from, kv_head()), row};
      rotate_row<32>(pair, Dk, p.call.rope,
                     position_of(p.call.rope, piece().batch, from, piece().position + token),
                     p.state.status, lane);
    }
    ptx::fence_proxy_async_global();
  }

  // ---- producer

  // The cluster's tile of number `id`.
  __device__ __forceinline__ void find_job(int id, int tiles, AttentionJob& job) const {
    const int group = p.problem.group, half = tiles * group;
    job.piece = piece();
    job.memory = id >= half;
    job.kv_head = kv_head();
    job.head = job.kv_head * group + id % group;
    job.first = (tiles - 1 - id % half / group) * Shape::rows;
    job.rows = min(Shape::rows, job.piece.len - job.first);
    job.blocks.template set<Shape::keys>(job.piece, job.first, job.rows);
    job.weigh_branches(p.problem, p.call, 1);
    const int token = static_cast<int>(job.piece.first), slot = job.piece.slot;
    job.v = {0, job.kv_head, token, job.batch_of(p.call.v)};
    job.k = job.rotates ? Box{0, job.kv_head, 0, static_cast<int>(blockIdx.y)}
                        : Box{0, job.kv_head, token, job.batch_of(p.call.k)};
    job.snapshot = {0, job.kv_head, 0, slot};
    const int64_t matrix = int64_t{slot} * p.problem.kv_heads + job.kv_head;
    job.z = pointer<const float>(p.state.normalizer) + matrix * Dk;
    job.scale = pointer<const float>(p.state.snapshot_scale) + matrix * (Dv / 32);
  }

  __device__ __forceinline__ void produce() const {
    AttentionProducer<T, Dk, Dv, 1> producer{maps, shared};
    const int tiles = (piece().len + Shape::rows - 1) / Shape::rows;
    const int all = tiles * p.problem.group * (p.call.a_mem.data ? 2 : 1);
    int id = rank();
    const auto next = [&](AttentionJob& job) {
      job.rows = 0;
      if (id < all) find_job(id, tiles, job);
      id += blocks();
    };
    while (producer.feed(p.call, next)) {
    }
    if (!updates()) {
      __syncwarp();
      ptx::meet_cluster();
      return;
    }
    const UpdateChunk& part = Shared::chunk();
    const TokenTiles<Shape::keys> tokens(piece(), part.first, part.end);
#pragma unroll 1
    for (int pass = 0; pass < Shared::kPasses; ++pass) {
      load_snapshot(producer, part, pass);
#pragma unroll 1
      for (int i = 0; i < tokens.count(); ++i) {
        const TokenTile tile = tokens.at(i);
        producer.load_keys(tile.open ? kMapRawOpenK : kMapRawK,
                           token_box(p.call.k, piece(), part.kv_head, tile, 0));
        producer.load_values(tile.open ? kMapOpenV : kMapV,
                             token_box(p.call.v, piece(), part.kv_head, tile, 0), tile.valid);
      }
      __syncwarp();
      meet_twice();
    }
  }

  // Warps that bring nothing: every thread of the cluster takes part in its barriers.
  __device__ __forceinline__ void attend_barriers() const {
    if (!updates()) {
      ptx::meet_cluster();
      return;
    }
#pragma unroll 1
    for (int pass = 0; pass < Shared::kPasses; ++pass) meet_twice();
  }

  static __device__ __forceinline__ void meet_twice() {
    ptx::meet_cluster();
    ptx::meet_cluster();
  }

  // A pass begins when all consumers have left the memory that it uses: the snapshot, or nothing,
  // comes through the rings of the queries.
  __device__ __forceinline__ void load_snapshot(AttentionProducer<T, Dk, Dv, 1>& producer,
                                                const UpdateChunk& part, int pass) const {
    for (int group = 0; group < Shape::groups; ++group) {
      shared.query_ring(group).acquire(producer.query);
    }
    if (producer.leader()) {
      const uint32_t full = shared.query_ring(0).full(0);
      for (int group = 1; group < Shape::groups; ++group) {
        ptx::mbarrier_arrive(shared.query_ring(group).full(0));
      }
      if (part.delta) {
        ptx::mbarrier_arrive_expect_tx(full, Shared::SnapshotTile::bytes);
        const Box box{pass * Shape::columns, part.kv_head, 0, piece().slot};
        shared.snapshot().template load_rows<Shared::kMemoryRows>(&maps[kMapSnapshot], box, full);
      } else {
        ptx::mbarrier_arrive(full);
      }
    }
    producer.query.advance();
  }

  // ---- consumers

  __device__ __forceinline__ void consume() const {
    AttentionConsumer<T, Dk, Dv, 1> consumer{{maps, shared}};
    consumer.group.start_turns();
    while (consumer.run(p.problem, p.call, p.state.status)) {
    }
    consumer.group.end_turns();
    if (updates()) {
      update({p, shared, consumer.group.query, consumer.group.key, consumer.group.value});
    } else {
      ptx::meet_cluster();
      append();
    }
    if (rank() == 0 && threadIdx.x == 0) finish_sequence();
  }

  __device__ __forceinline__ void update(MemoryUpdate<T, Dk, Dv> update) const {
    const UpdateChunk& part = Shared::chunk();
    const float* z = pointer<const float>(p.state.normalizer) + part.matrix * Dk;
    const float unit = part.delta ? normaliser_scale<Dk>(z) : 1.0f;
    for (int i = threadIdx.x; i < Dk; i += kThreads) {
      Shared::z()[i] = part.delta ? z[z_channel<Dk>(i)] * unit : 0.0f;
    }
    if (threadIdx.x == 0) Shared::chunk().unit = unit;
    update.meet();
#pragma unroll 1
    for (int pass = 0; pass < Shared::kPasses; ++pass) {
      update.run(pass);
      ptx::meet_cluster();  // all sums lie in shared memory; nobody reads the memory any more
      update.finish(pass);
      ptx::meet_cluster();  // nobody reads the sums any more
      ptx::fence_proxy_async_shared();
      const int group = update.group();
      shared.query_ring(group).release(update.query);
      update.query.advance();
    }
  }

  // The cluster's new tokens into the open segment, a share per block.
  __device__ __forceinline__ void append() const {
    const int share = (piece().len + blocks() - 1) / blocks(),
              first = min(rank() * share, piece().len);
    append_tokens<kThreads, T>(p.problem, p.call, p.state, piece(), kv_head(), first,
                               min(first + share, piece().len));
  }

  // Moves the counters when all KV heads of the sequence are done.
  __device__ __forceinline__ void finish_sequence() const {
    uint32_t* ticket = pointer<uint32_t>(p.exchange.sequence_tickets) + blockIdx.y;
    if (!last_thread(ticket, p.problem.kv_heads)) return;
    advance_counters(p.problem, p.state, piece(), p.call.rope.rows > 0);
  }
};

template <class T, int Dk, int Dv>
__device__ __forceinline__ void segment(const ptx::TensorMap* maps, const InfiniSegment& p) {
  using Block = Segment<T, Dk, Dv>;
  const Block block{maps, p, {}};
  if (threadIdx.x == 0) {
    block.shared.init();
    block.find_work();
  }
  __syncthreads();
  if (block.piece().len == 0) return;  // the whole cluster does
  if (p.call.rope.rows > 0) {
    block.rotate_keys();
    ptx::meet_cluster();
  }
  if (threadIdx.x >= Block::kThreads) {
    ptx::setmaxnreg_dec<Block::Shape::producer_registers>();
    if (threadIdx.x % 128 < 32) {
      block.produce();
    } else {
      block.attend_barriers();
    }
  } else {
    ptx::setmaxnreg_inc<Block::Shape::consumer_registers>();
    block.consume();
  }
}

}  // namespace infini

#define INFINI_INSTANCE(dk, dv) \
  INFINI_SM90_HEAD(segment, InfiniSegment, infini::kSegmentMaps, GroupSegmentTile, dk, dv)
INFINI_SM90_HEAD_DIMS(INFINI_INSTANCE)
