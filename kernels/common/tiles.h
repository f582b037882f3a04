// Tile shapes and shared-memory sizes of the portable kernels, and the head dimensions they are
// compiled for: the one place to change them (decode_tile.h: that of decode; sm90/tiles.h: those of
// Hopper). Plain C++, read by the kernels and by describe.cpp, from which the host learns threads
// and bytes of every launch.
#pragma once

// (Dk, Dv) of the attention and memory kernels: multiples of 32, the columns of M that share a scale
// and the least that the swizzle of a tile permutes.
#define INFINI_HEAD_DIMS(X) \
  X(32, 32) X(64, 64) X(96, 96) X(128, 128) X(256, 256) X(64, 128) X(128, 64) X(192, 128)

// Dk alone, each once.
#define INFINI_KEY_DIMS(X) X(32) X(64) X(96) X(128) X(192) X(256)

namespace infini {

constexpr int kWarp = 32;

// Local attention of one query head: 4 warps, each of `row_tiles` x 16 query rows; blocks of `keys`
// keys. Registers bound it: scores and output take 192 of them; at Dv = 256 a second row tile of
// accumulators would spill. At Dk = 192 an A100 had room for one block with more keys.
template <int Dk, int Dv>
struct AttentionTile {
  static constexpr int warps = 4;
  static constexpr int threads = warps * kWarp;
  static constexpr int row_tiles = Dv > 128 ? 1 : 2;
  static constexpr int rows = warps * row_tiles * 16;
  static constexpr int keys = Dk == 192 ? 32 : Dk == 64 && Dv == 64 ? 128 : 64;
  static constexpr int blocks_per_sm = 2;
  // Query tile, key tile, value tile; z; two weights per row.
  static constexpr int shared_bytes = 2 * (rows * Dk + keys * Dk + keys * Dv) + 4 * Dk + 8 * rows;
};

// A product over tokens, Xt sigma(K) [columns x Dk]: a warp per 16 columns of X, all of Dk in its
// registers; tiles of 64 tokens, two stages.
template <int Dk, int Columns>
struct UpdateTile {
  static constexpr int tokens = 64;
  static constexpr int stages = 2;
  static constexpr int warps = Columns / 16;
  static constexpr int threads = warps * kWarp;
  static constexpr int blocks_per_sm = 1;
  // Key and value tiles; z; one factor per token.
  static constexpr int shared_bytes = stages * 2 * tokens * (Dk + Columns) + 4 * Dk + 4 * tokens;
};

// Columns of V that one block of segment_state and commit takes: all, unless the accumulators
// would not fit its registers; then K is read again (from L2) for the others.
template <int Columns>
constexpr int kUpdateColumns = Columns <= 128       ? Columns
                               : Columns % 128 == 0 ? 128
                                                    : Columns / 2;

// The same inside the one-launch segment kernel, whose blocks have the 4 warps of its attention;
// above Dk = 128 they take the columns of K in two halves.
template <int Dv>
constexpr int kSegmentColumns = Dv % 64 == 0 ? 64 : 32;
template <int Dk>
constexpr int kSegmentKeys = Dk > 128 ? Dk / 2 : Dk;

// Serial scan over segments: 32 columns of M per block, a warp per 16 rows; G streams through a ring
// of [Dk x 32] panels, those of two segments where these are small enough.
template <int Dk>
struct ScanTile {
  static constexpr int warps = Dk / 16;
  static constexpr int threads = warps * kWarp;
  static constexpr int columns = 32;
  static constexpr int blocks_per_sm = 1;
  static constexpr int panel_bytes = 2 * Dk * 32;
  static constexpr int panels = Dk > 192 ? 4 : Dk > 128 ? Dk / 32 : 2 * (Dk / 32);
  // The ring; the operand form of M before two segments.
  static constexpr int shared_bytes = panels * panel_bytes + 2 * 2 * Dk * columns;
};

// One-launch segment: attention blocks and update blocks side by side.
template <int Dk, int Dv>
struct SegmentTile {
  using Attention = AttentionTile<Dk, Dv>;
  using Update = UpdateTile<Dk, kSegmentColumns<Dv>>;
  // Update blocks per chunk of tokens and KV head.
  static constexpr int slices = Dv / kSegmentColumns<Dv> * (Dk / kSegmentKeys<Dk>);
  static constexpr int threads = Attention::threads;
  static constexpr int blocks_per_sm = 2;
  static constexpr int shared_bytes = Attention::shared_bytes > Update::shared_bytes
                                          ? Attention::shared_bytes
                                          : Update::shared_bytes;
};

// Element-wise kernels.
constexpr int kElementThreads = 256;

}  // namespace infini
