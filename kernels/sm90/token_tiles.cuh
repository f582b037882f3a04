// Tokens of a segment in the tiles in which they come: those of the open segment, then the new
// ones. No tile has both, for they come by different tensor maps.
#pragma once

#include "common/piece.cuh"
#include "sm90/shared_tile.cuh"

namespace infini {

// A tile: where it lies, and how many of its rows count.
struct TokenTile {
  bool open;  // in the open segment, else among the new tokens
  int start;  // its first row there
  int valid;
};

template <int Tokens>
struct TokenTiles {
  int open, open_end;    // rows of the open segment
  int fresh, fresh_end;  // new tokens

  // Tokens `first` to `end` of the piece's segment.
  __device__ __forceinline__ TokenTiles(const InfiniPiece& piece, int first, int end)
      : open(first),
        open_end(max(first, min(end, piece.cached))),
        fresh(max(first - piece.cached, 0)),
        fresh_end(max(end - piece.cached, fresh)) {}

  __device__ __forceinline__ int open_tiles() const {
    return (open_end - open + Tokens - 1) / Tokens;
  }
  __device__ __forceinline__ int count() const {
    return open_tiles() + (fresh_end - fresh + Tokens - 1) / Tokens;
  }
  __device__ __forceinline__ TokenTile at(int i) const {
    const bool is_open = i < open_tiles();
    const int start = is_open ? open + i * Tokens : fresh + (i - open_tiles()) * Tokens;
    return {is_open, start, min(Tokens, (is_open ? open_end : fresh_end) - start)};
  }
};

// Box of a tile of keys or values, from `channel` on.
__device__ __forceinline__ Box token_box(const InfiniTensor& t, const InfiniPiece& piece,
                                         int kv_head, const TokenTile& tile, int channel) {
  if (tile.open) return {channel, kv_head, tile.start, piece.slot};
  return {channel, kv_head, static_cast<int>(piece.first) + tile.start,
          t.batch == 0 ? 0 : piece.batch};
}

}  // namespace infini
