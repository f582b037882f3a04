// Folds open segments into (M, z): those that are full, or any under `flush`.
//
// Tile: UpdateTile<Dk, columns> (common/update.cuh). Grid (chunks, Hkv * Dv / columns, sequences at
// a time): a block takes `chunk_len` tokens of an open segment and writes a partial update; the
// last block of a head adds the partials in index order and writes M, z and the snapshot in place;
// the last head of a sequence moves its counters. Of a sequence with anything to fold all blocks
// take a ticket, idle ones too.
//
// Behind a step of decoding there is rarely anything to fold: a block looks at the counters of all
// its sequences at once, and ends.
//
// Shared memory: two stages of key and value tiles, z, factors. Barriers: __syncthreads; tickets in
// global memory, 0 between launches.
//
// Per token and head 2 Dk Dv flops (4 under the delta rule); reads the segment, M (snapshot) and z
// once, writes and reads 4 Dk (Dv + 1) bytes per chunk, reads and writes M and z once.
#include "common/instantiate.h"
#include "common/update_block.cuh"

namespace infini {

// A sequence's open segment.
struct Open {
  InfiniCounters* counters;
  int slot;
  int len;  // tokens to fold; 0: none
  bool empty;
};

__device__ __forceinline__ Open open_of(const InfiniCommit& p, int sequence) {
  const int slot = sequence_of(p.sequences, sequence).slot;
  InfiniCounters* counters = counters_of(p.state, slot);
  int len = counters ? static_cast<int>(counters->open_len) : 0;
  if (len < 0 || len > p.problem.segment_len) {
    report(p.state.status, INFINI_STATUS_LENGTH);
    len = 0;
  }
  if (!p.flush && len < p.problem.segment_len) len = 0;
  return {counters, slot, len, counters && counters->committed == 0};
}

// This block's part of a partial update.
template <class T, int Dk, int Dv>
__device__ __forceinline__ void update(const InfiniCommit& p, int sequence, unsigned char* shared) {
  constexpr int kColumns = kUpdateColumns<Dv>, kSlices = Dv / kColumns;
  constexpr int kThreads = UpdateTile<Dk, kColumns>::threads;
  const Open open = open_of(p, sequence);
  const int chunk = blockIdx.x, kv_head = blockIdx.y / kSlices, slice = blockIdx.y % kSlices;
  const int first = chunk * p.chunk_len, end = min(first + p.chunk_len, open.len);
  if (first >= end) return;
  __shared__ UpdateTask<T> task;
  const auto rows = [&](uint64_t address, int columns) {
    const T* data = segment_rows<const T>(address, p.problem, open.slot, kv_head, columns);
    return SegmentRows<T>{{data, columns}, {data, columns}, open.len};
  };
  if (threadIdx.x == 0) {
    const int64_t head = int64_t{sequence} * p.problem.kv_heads + kv_head;
    task = {{rows(p.state.open_k, Dk), rows(p.state.open_v, Dv)},
            int64_t{open.slot} * p.problem.kv_heads + kv_head,
            partial_of<Dk, Dv>(p.exchange, head, p.chunks, chunk),
            first,
            end,
            slice * kColumns,
            0,
            open.empty};
  }
  __syncthreads();
  update_block<kThreads, T, Dk, Dv, kColumns>(p.problem, p.state, task, shared);
}

// What is left to the last blocks.
template <class T, int Dk, int Dv>
__device__ __forceinline__ void finish(const InfiniCommit& p, int sequence) {
  constexpr int kColumns = kUpdateColumns<Dv>, kSlices = Dv / kColumns;
  constexpr int kThreads = UpdateTile<Dk, kColumns>::threads;
  const Open open = open_of(p, sequence);
  const int kv_head = blockIdx.y / kSlices;
  const int64_t head = int64_t{sequence} * p.problem.kv_heads + kv_head;
  if (!last_block(pointer<uint32_t>(p.exchange.head_tickets) + head, gridDim.x * kSlices)) return;
  const int64_t matrix = int64_t{open.slot} * p.problem.kv_heads + kv_head;
  finish_memory<kThreads, T, Dk, Dv>(p.state, matrix, open.empty,
                                     partial_of<Dk, Dv>(p.exchange, head, p.chunks, 0),
                                     (open.len + p.chunk_len - 1) / p.chunk_len);
  if (!last_block(pointer<uint32_t>(p.exchange.sequence_tickets) + sequence, p.problem.kv_heads)) {
    return;
  }
  if (threadIdx.x == 0) {
    open.counters->committed += open.len;
    open.counters->open_len = 0;
  }
}

template <class T, int Dk, int Dv>
__device__ __forceinline__ void commit(const InfiniCommit& p, unsigned char* shared) {
  constexpr int kThreads = UpdateTile<Dk, kUpdateColumns<Dv>>::threads;
  bool found = false;
  const int step = gridDim.z * kThreads;
  for (int i = blockIdx.z + gridDim.z * threadIdx.x; i < p.sequences.count; i += step) {
    found |= open_of(p, i).len > 0;
  }
  if (!__syncthreads_or(found)) return;
  __shared__ int sequence;  // there it takes no register through the update
  if (threadIdx.x == 0) sequence = blockIdx.z;
  __syncthreads();
  while (sequence < p.sequences.count) {
    if (open_of(p, sequence).len > 0) {
      update<T, Dk, Dv>(p, sequence, shared);
      finish<T, Dk, Dv>(p, sequence);
    }
    __syncthreads();
    if (threadIdx.x == 0) sequence += gridDim.z;
    __syncthreads();
  }
}

template <int Dk, int Dv>
using CommitTile = UpdateTile<Dk, kUpdateColumns<Dv>>;

}  // namespace infini

#define INFINI_INSTANCE(dk, dv) INFINI_HEAD(commit, InfiniCommit, CommitTile, dk, dv)
INFINI_HEAD_DIMS(INFINI_INSTANCE)
