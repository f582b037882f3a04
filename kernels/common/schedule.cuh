// The order of attention tiles: groups of pieces whose keys and values stay in L2 together; of a
// group the longest tiles first; of tiles of one length all heads of a piece side by side, since
// the heads of a group share keys and values.
#pragma once

#include "common/piece.cuh"

namespace infini {

struct TilePlace {
  int piece, head, kv_head;
  int first;    // the tile's first row within the piece
  bool memory;  // of the second half of the tiles, which write the memory branch alone
};

// Number of tiles of a run.
__device__ __forceinline__ int tile_count(const InfiniSegmentAttention& p) {
  return p.tiles * p.run.piece_count * p.problem.heads * (p.call.a_mem.data ? 2 : 1);
}

__device__ __forceinline__ TilePlace tile_place(const InfiniSegmentAttention& p, int rows, int id) {
  const int heads = p.problem.heads, half = p.tiles * p.run.piece_count * heads;
  const bool memory = id >= half;
  id -= memory ? half : 0;
  const int around = p.tiles * p.piece_group * heads, before = id / around * p.piece_group;
  id %= around;
  const int pieces = min(p.piece_group, p.run.piece_count - before);
  const int head = id % heads;
  id /= heads;
  return {before + id % pieces, head, head / p.problem.group, (p.tiles - 1 - id / pieces) * rows,
          memory};
}

}  // namespace infini
