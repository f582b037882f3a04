// What a segment, decode or commit launch does for one sequence: read from device memory, checked
// where it is read.
#pragma once

#include "common/rotate.cuh"

namespace infini {

__device__ __forceinline__ InfiniSequence sequence_of(const InfiniSequences& s, int index) {
  if (s.table) return pointer<const InfiniSequence>(s.table)[index];
  if (s.in_line) return s.inline_sequences[index];
  return {0, index, index, s.tokens, 0};
}

// The counters of a sequence's slot; null for padding, and when the state has no such slot, which is
// reported.
__device__ __forceinline__ InfiniCounters* counters_of(const InfiniState& state, int slot) {
  if (slot < 0 || slot >= state.slots) {
    if (slot != INFINI_PAD_SLOT) report(state.status, INFINI_STATUS_SLOT);
    return nullptr;
  }
  return pointer<InfiniCounters>(state.counters) + slot;
}

// The piece of a sequence's segment that its next tokens form, `taken` of which an earlier step has
// appended; at most `limit`. Its length is 0 when there is nothing to do or the sequence must be
// skipped.
__device__ __forceinline__ InfiniPiece piece_of(const InfiniProblem& p, const InfiniState& state,
                                                const InfiniRope& rope, const InfiniSequences& all,
                                                const InfiniSequence& s, int taken) {
  InfiniPiece piece = {};
  const InfiniCounters* counters = counters_of(state, s.slot);
  if (!counters) return piece;
  const bool fits = s.len >= 0 && s.len <= all.max_len && s.first >= 0 &&
                    s.first + s.len <= all.tokens && s.batch >= 0 && s.batch < all.count;
  if (!fits) {
    report(state.status, INFINI_STATUS_LENGTH);
    return piece;
  }
  const int open = static_cast<int>(counters->open_len);
  piece.first = s.first + taken;
  piece.position = static_cast<int64_t>(counters->tokens);
  piece.slot = s.slot;
  piece.batch = s.batch;
  piece.len = min(s.len - taken, p.segment_len - open);
  piece.cached = open;
  piece.full = open + piece.len == p.segment_len;
  piece.empty = counters->committed == 0;
  if (piece.len > 0 && open > 0 && (counters->rotated != 0) != (rope.rows > 0)) {
    report(state.status, INFINI_STATUS_ROTATION);
    piece.len = 0;
  }
  return piece;
}

// Moves the counters of a piece's slot to its end.
__device__ __forceinline__ void advance_counters(const InfiniProblem& p, const InfiniState& state,
                                                 const InfiniPiece& piece, bool rotated) {
  InfiniCounters& c = pointer<InfiniCounters>(state.counters)[piece.slot];
  c.tokens += piece.len;
  c.committed += piece.full ? p.segment_len : 0;
  c.open_len = piece.full ? 0 : piece.cached + piece.len;
  c.rotated = rotated;
  c.taken = 0;
}

// Whether this thread is the last of `count` to come here; the ticket is 0 before and after. What
// the others wrote before they came is visible to the last.
__device__ __forceinline__ bool last_thread(uint32_t* ticket, uint32_t count) {
  return ptx::atom_inc_acq_rel(ticket, count - 1) == count - 1;
}

// The same of a block. Every thread of it takes part; `meanwhile()` runs in all warps but the first
// while the ticket is on its way.
template <class Meanwhile>
__device__ __forceinline__ bool last_block(uint32_t* ticket, uint32_t blocks, Meanwhile meanwhile) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) last = last_thread(ticket, blocks);
  if (threadIdx.x >= 32) meanwhile();
  __syncthreads();
  return last;
}

__device__ __forceinline__ bool last_block(uint32_t* ticket, uint32_t blocks) {
  return last_block(ticket, blocks, [] {});
}

}  // namespace infini
