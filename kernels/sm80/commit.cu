// Folds open segments into (M, z): those that are full, or under `flush` any that hold tokens.
//
// Tile: UpdateTile<Dk, columns>, a warp per 16 columns of V (common/update.cuh). Grid (chunks,
// Hkv * Dv / columns, sequences): a block takes `chunk_len` tokens of an open segment, the first
// column slice also their column sums. Partial sums go through the exchange; the last block of a
// head folds them, the last head advances the counters (common/finish.cuh). M, z and their snapshot
// are written only after every block of the head has read what it needs of them.
//
// Shared memory: two stages of key and value tiles, z, factors. Barriers: __syncthreads; between
// blocks integer tickets, behind fences.
//
// Per token and head 2 Dk Dv flops, twice that under the delta rule; reads Dk + Dv elements once (Dk
// twice at Dv = 256, the second time from L2), writes and reads 4 Dk (Dv + 1) bytes per chunk, reads
// and writes M and z, writes the snapshot, and reads it in every chunk under the delta rule.
#include "common/finish.cuh"
#include "common/instantiate.h"
#include "common/piece.cuh"
#include "common/update.cuh"

namespace infini {

// Tokens of the open segment that this call commits; 0: leave the sequence alone.
__device__ __forceinline__ int tokens_to_commit(const InfiniCommit& p,
                                                const InfiniCounters* counters) {
  if (!counters) return 0;
  const uint32_t open = counters->open_len, full = p.problem.segment_len;
  if (open > full) {
    report(p.state.status, INFINI_STATUS_LENGTH);
    return 0;
  }
  return p.flush || open == full ? open : 0;
}

template <class T, int Dk, int Dv>
__device__ __forceinline__ void commit(const InfiniCommit& p, unsigned char* shared) {
  constexpr int kColumns = kUpdateColumns<Dv>, kSlices = Dv / kColumns;
  constexpr int kThreads = UpdateTile<Dk, kColumns>::threads;
  using Product = Update<T, Dk, kColumns, kThreads>;
  const int chunk = blockIdx.x, kv_head = blockIdx.y / kSlices, slice = blockIdx.y % kSlices;
  const int sequence = blockIdx.z, slot = sequence_of(p.sequences, sequence).slot;
  InfiniCounters* const counters = counters_of(p.state, slot);
  const int tokens = tokens_to_commit(p, counters);
  if (tokens == 0) return;  // the same in every block of the sequence
  const bool empty = counters->committed == 0;

  const int first = chunk * p.chunk_len, end = min(first + p.chunk_len, tokens);
  if (first < end) {
    const int64_t head = int64_t{slot} * p.problem.kv_heads + kv_head;
    const bool delta = p.problem.delta && !empty;
    Product update(shared);
    if (delta) {
      update.load_memory(pointer<const T>(p.state.snapshot) + head * (Dk * Dv),
                         pointer<const float>(p.state.snapshot_scale) + head * (Dv / 32), Dv,
                         slice * kColumns);
    }
    const float* z = pointer<const float>(p.state.normalizer) + head * Dk;
    for (int i = threadIdx.x; i < Dk; i += kThreads) update.z[i] = delta ? z[i] : 0.0f;

    const Rows<T> k{segment_rows<T>(p.state.open_k, p.problem, slot, kv_head, Dk), Dk};
    const Rows<T> v{segment_rows<T>(p.state.open_v, p.problem, slot, kv_head, Dv), Dv};
    // All rows lie in the open segment, those of a last partial tile too.
    const SegmentRows<T> keys{k, {}, p.problem.segment_len + Product::kTokens};
    update.template run<true>(
        p.problem, keys, first, end, delta, slice == 0,
        [&](int stage, int token) {
          load_tile<kThreads>(update.value_tile(stage), v, token, end, slice * kColumns);
        },
        [](float den) { return den == 0.0f ? 0.0f : 1.0f / den; }, [](int) {});

    float* to = partial_of<Dk, Dv>(p.exchange, p.problem, p.chunks, sequence, kv_head, chunk);
    update.store(to, Dv, slice * kColumns);
    if (slice == 0) update.store_sums(to + Dk * Dv);
  }

  if (!last_of_head(p.exchange, p.problem, sequence, kv_head, p.chunks * kSlices)) return;
  const int used = (tokens + p.chunk_len - 1) / p.chunk_len;
  fold_partials<T, Dk, Dv, kThreads>(
      p.problem, p.state, partial_of<Dk, Dv>(p.exchange, p.problem, p.chunks, sequence, kv_head, 0),
      used, slot, kv_head, empty);

  if (!last_of_sequence(p.exchange, p.problem, sequence) || threadIdx.x != 0) return;
  counters->committed += tokens;
  counters->open_len = 0;
}

template <int Dk, int Dv>
using CommitTile = UpdateTile<Dk, kUpdateColumns<Dv>>;

}  // namespace infini

#define INFINI_INSTANCE(dk, dv) INFINI_HEAD(commit, InfiniCommit, CommitTile, dk, dv)
INFINI_HEAD_DIMS(INFINI_INSTANCE)
