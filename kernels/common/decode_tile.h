// The tile of decode, apart from the others for variants to change: no other kernel reads it. Rules
// as in tiles.h.
#pragma once

#include "common/tiles.h"

namespace infini {

// Decoding packs the query heads of a KV head into the rows of one tile, of which few are in use:
// the warps share the keys of a tile. What lies in flight at an SM bounds it, and how many blocks
// can hide each other's beginning and end.
template <int Dk, int Dv>
struct DecodeTile {
  static constexpr int warps = 4;
  static constexpr int threads = warps * kWarp;
  static constexpr int rows = 32;
  static constexpr int keys = 64;
  // Two tiles of keys and values in flight, where two blocks of an SM have room for them.
  static constexpr int stages = Dk + Dv > 320 ? 1 : 2;
  static constexpr int blocks_per_sm = Dk + Dv > 256 ? 2 : 3;
  static constexpr int ring_bytes = stages * 2 * keys * (Dk + Dv);
  // Key and value tiles; query tile; z; a maximum and a sum per row and warp, a weight per row.
  static constexpr int shared_bytes =
      ring_bytes + 2 * rows * Dk + 4 * Dk + 8 * 16 * warps + 4 * rows;
};

}  // namespace infini
