// One tile of query rows, as producer and consumers see it: where its operands lie, and the blocks
// of keys it meets, in order.
#pragma once

#include "common/gate.cuh"
#include "common/piece.cuh"
#include "sm90/shared_tile.cuh"

namespace infini {

// Tensor maps of the attention kernels, in the order of their parameters.
enum AttentionMap {
  kMapQ,
  kMapK,  // what the local branch reads: rotated where the call rotates
  kMapV,
  kMapOpenK,
  kMapOpenV,
  kMapSnapshot,
  kMapO,
  kMapADot,
  kMapAMem,
  kAttentionMaps,
  // Of segment alone: keys as the memory sees them.
  kMapRawK = kAttentionMaps,
  kMapRawOpenK,
  kSegmentMaps
};

// A block of keys: where it lies, how many of its rows belong to the segment, and how many row 0 of
// the tile sees; row r sees `step` * r more.
struct KeyBlock {
  bool open;  // in the open segment, else among the new keys
  int start;  // its first row there
  int valid;
  int visible, step;
};

// The blocks of a tile: those that some row does not see whole come first.
struct KeyBlocks {
  int cached, len;    // rows of the open segment, new rows of the piece
  int first;          // the tile's
  int whole, all;     // blocks of new keys: seen whole by every row, all
  int masked, count;  // blocks that need a mask, all

  template <int Keys>
  __device__ __forceinline__ void set(const InfiniPiece& piece, int first_row, int rows) {
    cached = piece.cached;
    len = piece.len;
    first = first_row;
    whole = (first + 1) / Keys;
    all = (first + rows + Keys - 1) / Keys;
    masked = all - whole + (cached % Keys != 0);
    count = all + (cached + Keys - 1) / Keys;
  }

  // Block `i` of `count`.
  template <int Keys>
  __device__ __forceinline__ KeyBlock at(int i) const {
    const int diagonal = all - whole;
    bool open = i >= diagonal && i < masked;
    int block = open ? cached / Keys : all - 1 - i;
    if (i >= masked) {
      open = i - masked >= whole;
      block = (open ? whole + cached / Keys : whole) - 1 - (i - masked);
    }
    const int start = block * Keys;
    return {open, start, min(Keys, (open ? cached : len) - start),
            (open ? cached : first + 1) - start, open ? 0 : 1};
  }
};

// A tile of query rows. It lies in shared memory: the producer writes it, and it takes no registers
// through main loops.
struct AttentionJob {
  InfiniPiece piece;
  int head, kv_head;
  int first, rows;  // of the tile, within the piece; 0 rows: there are no more tiles
  bool memory;      // writes the memory branch alone
  bool attends, retrieves, rotates;
  bool reloads;  // the raw queries come twice: the first are gone when the retrieval needs them
  Gate gate;
  // Boxes of row 0 of the piece's new keys and values, and of the memory.
  Box k, v, snapshot;
  KeyBlocks blocks;
  const float* z;      // [Dk]
  const float* scale;  // of the snapshot, [Dv / 32]

  // A packed tensor has one batch.
  __device__ __forceinline__ int batch_of(const InfiniTensor& t) const {
    return t.batch == 0 ? 0 : piece.batch;
  }

  __device__ __forceinline__ Box row_box(const InfiniTensor& t, int row) const {
    return {0, head, static_cast<int>(piece.first) + first + row, batch_of(t)};
  }

  // Weights of the branches, and what they leave to do. `shared_by` heads that load together do
  // what any of them must.
  __device__ __forceinline__ void weigh_branches(const InfiniProblem& p, const InfiniCall& call,
                                                 int shared_by) {
    const auto gate_of_head = [&](int h) {
      return memory ? Gate{1.0f, 0.0f}
                    : gate_of(p, pointer<const float>(call.gate)[h], piece.empty);
    };
    gate = gate_of_head(head);
    const Gate other = shared_by > 1 ? gate_of_head(head ^ 1) : gate;
    const bool asked = !memory && (call.lse.data || call.a_dot.data);
    attends = asked || gate.local != 0.0f || other.local != 0.0f;
    retrieves = !piece.empty && (gate.memory != 0.0f || other.memory != 0.0f);
    rotates = attends && call.rope.rows > 0;
    reloads = attends && retrieves && (rotates || (call.a_dot.data && !memory));
  }
};

}  // namespace infini
