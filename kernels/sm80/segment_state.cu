// Phase 1 of prefill: B = sigma(K)t V and the column sums of sigma(K) of every full piece.
//
// Tile: UpdateTile<Dk, columns>, a warp per 16 columns of V (common/update.cuh). Grid (splits,
// Hkv * Dv / columns, pieces): a block takes `split_len` tokens of a segment. The first column
// slice writes the sums. Without values only the sums are written.
//
// Shared memory: two stages of key and value tiles, z (unused), factors (unused).
//
// Per token and head 2 Dk Dv flops; reads Dk + Dv elements once (Dk twice at Dv = 256, the second
// time from L2), writes 4 Dk (Dv + 1) bytes per split.
#include "common/instantiate.h"
#include "common/piece.cuh"
#include "common/update.cuh"

namespace infini {

template <class T, int Dk, int Dv>
__device__ __forceinline__ void segment_state(const InfiniSegmentState& p, unsigned char* shared) {
  constexpr int kColumns = kUpdateColumns<Dv>, kSlices = Dv / kColumns;
  constexpr int kThreads = UpdateTile<Dk, kColumns>::threads;
  const int split = blockIdx.x, kv_head = blockIdx.y / kSlices, slice = blockIdx.y % kSlices;
  const InfiniPiece& piece = pointer<const InfiniPiece>(p.run.pieces)[blockIdx.z];
  const bool values = p.v.data != 0;
  if (!piece.full || (!values && slice > 0)) return;

  const SegmentRows<T> k = keys_of<T>(p.problem, p.k, p.state, piece, kv_head);
  const SegmentRows<T> v = values_of<T>(p.problem, p.v, p.state, piece, kv_head);
  const int first = split * p.split_len;
  const int end = min(first + p.split_len, piece.cached + piece.len);
  Update<T, Dk, kColumns, kThreads> update(shared);
  for (int i = threadIdx.x; i < Dk; i += kThreads) update.z[i] = 0.0f;
  update.template run<false>(
      p.problem, k, first, end, 1.0f, false, slice == 0,
      [&](int stage, int token) {
        // Without values the products run on zeros.
        load_tile<kThreads>(update.value_tile(stage), v, token, values ? end : 0, slice * kColumns);
      },
      [](float) { return 0.0f; }, [](int) {});

  const int64_t record = (int64_t{blockIdx.z} * p.problem.kv_heads + kv_head) * p.splits + split;
  if (values) {
    update.store(pointer<float>(p.b) + record * (Dk * Dv), Dv, slice * kColumns);
  }
  if (slice == 0) update.store_sums(pointer<float>(p.sums) + record * Dk, shared);
}

template <int Dk, int Dv>
using SegmentStateTile = UpdateTile<Dk, kUpdateColumns<Dv>>;

}  // namespace infini

#define INFINI_INSTANCE(dk, dv) \
  INFINI_HEAD(segment_state, InfiniSegmentState, SegmentStateTile, dk, dv)
INFINI_HEAD_DIMS(INFINI_INSTANCE)
