// Folds open segments into (M, z): those that are full, or any under `flush`.
//
// Tile: UpdateTile<Dk, columns> (common/update.cuh). Grid (chunks, Hkv * Dv / columns, sequences):
// a block takes `chunk_len` tokens of the open segment and writes a partial update; the last block
// of a head adds the partials in index order and writes M, z and the snapshot in place; the last
// head of a sequence moves its counters. Blocks with nothing to do still take their ticket.
//
// Shared memory: two stages of key and value tiles, z, factors. Barriers: __syncthreads; tickets in
// global memory, 0 between launches.
//
// Per token and head 2 Dk Dv flops (4 under the delta rule); reads the segment, M (snapshot) and z
// once, writes and reads 4 Dk (Dv + 1) bytes per chunk, reads and writes M and z once.
#include "common/instantiate.h"
#include "common/update_block.cuh"

namespace infini {

template <class T, int Dk, int Dv>
__device__ __forceinline__ void commit(const InfiniCommit& p, unsigned char* shared) {
  constexpr int kColumns = kUpdateColumns<Dv>, kSlices = Dv / kColumns;
  constexpr int kThreads = UpdateTile<Dk, kColumns>::threads;
  const int chunk = blockIdx.x, kv_head = blockIdx.y / kSlices, slice = blockIdx.y % kSlices;
  const int slot = sequence_of(p.sequences, blockIdx.z).slot;
  InfiniCounters* counters = counters_of(p.state, slot);
  int open = counters ? static_cast<int>(counters->open_len) : 0;
  if (open < 0 || open > p.problem.segment_len) {
    report(p.state.status, INFINI_STATUS_LENGTH);
    open = 0;
  }
  const bool empty = counters && counters->committed == 0;
  const int len = p.flush || open == p.problem.segment_len ? open : 0;

  const int64_t head = int64_t{blockIdx.z} * p.problem.kv_heads + kv_head;
  const int64_t matrix = int64_t{slot} * p.problem.kv_heads + kv_head;
  const int first = chunk * p.chunk_len, end = min(first + p.chunk_len, len);
  if (first < end) {
    __shared__ UpdateTask<T> task;
    const auto rows = [&](uint64_t address, int columns) {
      const T* data = segment_rows<const T>(address, p.problem, slot, kv_head, columns);
      return SegmentRows<T>{{data, columns}, {data, columns}, len};
    };
    if (threadIdx.x == 0) {
      task = {{rows(p.state.open_k, Dk), rows(p.state.open_v, Dv)},
              matrix,
              partial_of<Dk, Dv>(p.exchange, head, p.chunks, chunk),
              first,
              end,
              slice * kColumns,
              0,
              empty};
    }
    __syncthreads();
    update_block<kThreads, T, Dk, Dv, kColumns>(p.problem, p.state, task, shared);
  }

  if (!last_block(pointer<uint32_t>(p.exchange.head_tickets) + head, gridDim.x * kSlices)) return;
  if (len > 0) {
    finish_memory<kThreads, T, Dk, Dv>(p.state, matrix, empty,
                                       partial_of<Dk, Dv>(p.exchange, head, p.chunks, 0),
                                       (len + p.chunk_len - 1) / p.chunk_len);
  }
  if (!last_block(pointer<uint32_t>(p.exchange.sequence_tickets) + blockIdx.z,
                  p.problem.kv_heads)) {
    return;
  }
  if (threadIdx.x == 0 && len > 0) {
    counters->committed += len;
    counters->open_len = 0;
  }
}

template <int Dk, int Dv>
using CommitTile = UpdateTile<Dk, kUpdateColumns<Dv>>;

}  // namespace infini

#define INFINI_INSTANCE(dk, dv) INFINI_HEAD(commit, InfiniCommit, CommitTile, dk, dv)
INFINI_HEAD_DIMS(INFINI_INSTANCE)
