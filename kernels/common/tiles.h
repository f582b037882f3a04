// Tile shapes and shared-memory sizes of every kernel, and the head dimensions they are compiled
// for: the one place to change them. Plain C++, read by the kernels and by describe.cpp, from which
// the host learns threads and bytes of every launch.
#pragma once

// (Dk, Dv) of the attention and memory kernels.
#define INFINI_HEAD_DIMS(X) \
  X(64, 64) X(96, 96) X(128, 128) X(256, 256) X(64, 128) X(128, 64) X(192, 128)

// Dk alone, each once.
#define INFINI_KEY_DIMS(X) X(64) X(96) X(128) X(192) X(256)

namespace infini {

constexpr int kWarp = 32;

// Local attention of one query head: 4 warps, each of `row_tiles` x 16 query rows; blocks of `keys`
// keys. Registers bound it: at Dv = 256 a second row tile of accumulators would spill.
template <int Dk, int Dv>
struct AttentionTile {
  static constexpr int warps = 4;
  static constexpr int threads = warps * kWarp;
  static constexpr int row_tiles = Dv > 128 ? 1 : 2;
  static constexpr int rows = warps * row_tiles * 16;
  static constexpr int keys = Dk == 192 ? 32 : 64;  // 64 would spill where keys are rotated
  static constexpr int blocks_per_sm = 2;
  // Steps of 16 channels that Q Kt has in flight: as many as registers allow without a spill.
  static constexpr int score_unroll = Dv >= 128 ? 1 : 2;
  // Query tile, key tile, value tile; z; two weights per row.
  static constexpr int shared_bytes = 2 * (rows * Dk + keys * Dk + keys * Dv) + 4 * Dk + 8 * rows;
};

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

// ---- Hopper

// (Dk, Dv) that the Hopper kernels serve, and Dk alone.
#define INFINI_SM90_HEAD_DIMS(X) X(64, 64) X(128, 128) X(256, 256)
#define INFINI_SM90_KEY_DIMS(X) X(64) X(128) X(256)

// Local attention of one query head: consumer warpgroups of 64 query rows each and a producer
// warpgroup; blocks of `keys` keys, rings of two; so many query tiles as `QueryStages` are there at a
// time. One block per SM: registers bound it, above d = 64 shared memory as well.
template <int Dk, int Dv, int QueryStages = (Dk > 128 ? 1 : 2)>
struct GroupAttentionTile {
  static constexpr int groups = 2;
  static constexpr int rows = 64 * groups;
  static constexpr int keys = Dv > 128 ? 64 : 128;
  static constexpr int stages = 2;
  static constexpr int query_stages = QueryStages;
  static constexpr int threads = 128 * (groups + 1);
  static constexpr int blocks_per_sm = 1;
  static constexpr int consumer_registers = 224;
  static constexpr int producer_registers = 56;
  // Query ring, key ring, value ring; mbarriers and jobs.
  static constexpr int tile_bytes = 2 * (QueryStages * rows * Dk + stages * keys * (Dk + Dv));
  static constexpr int shared_bytes = tile_bytes + 640;
};

// A product over tokens, sigma(K)t X [Rows x Columns], Rows channels of K: warpgroups of
// `row_tiles` x 64 of them, all columns of X in their registers; tiles of `tokens` tokens of
// `Loaded` channels in all.
template <int Rows, int Columns, int Loaded>
struct GroupUpdateTile {
  static constexpr int groups = Rows >= 128 ? 2 : 1;
  static constexpr int row_tiles = Rows / (64 * groups);
  static constexpr int tokens = 64;
  static constexpr int threads = 128 * groups;
  // Two where the sums leave room: one starts or ends while the other multiplies.
  static constexpr int blocks_per_sm = row_tiles * Columns > 128 ? 1 : 2;
  static constexpr int stage_bytes = tokens * Loaded * 2;
  static constexpr int stages = blocks_per_sm * 4 * stage_bytes > 200 * 1024 ? 2 : 4;
  // The ring; mbarriers, z, factors of the tokens of two tiles.
  static constexpr int ring_bytes = stages * stage_bytes;
  static constexpr int shared_bytes = ring_bytes + 128 + 4 * Loaded + 4 * 2 * tokens;
};

// segment_state: all of Dk, `kUpdateColumns` of Dv. segment_transition: so many rows of G.
template <int Dk, int Dv>
using GroupStateTile = GroupUpdateTile<Dk, kUpdateColumns<Dv>, Dk + kUpdateColumns<Dv>>;
template <int Dk>
using GroupTransitionTile = GroupUpdateTile<kUpdateColumns<Dk>, Dk, Dk>;

// One-launch segment: a cluster of up to 8 blocks has a sequence's KV head to itself.
template <int Dk, int Dv>
struct GroupSegmentTile {
  using Attention = GroupAttentionTile<Dk, Dv, 1>;
  static constexpr int groups = Attention::groups;
  static constexpr int rows = Attention::rows;
  static constexpr int keys = Attention::keys;
  static constexpr int threads = Attention::threads;
  static constexpr int blocks_per_sm = 1;
  static constexpr int consumer_registers = Attention::consumer_registers;
  static constexpr int producer_registers = Attention::producer_registers;
  // Columns of M that are updated at a time: all their sums fit the registers of two groups.
  static constexpr int columns = kUpdateColumns<Dv>;
  // Behind those of attention: z, column sums and their parts, factors of two tiles, one value per
  // warp, the piece, the chunk.
  static constexpr int extra_bytes = 4 * Dk + 4 * Dk + 8 * 256 + 8 * keys + 64 + 64 + 32;
  static constexpr int shared_bytes = Attention::shared_bytes + extra_bytes;
};

// Element-wise kernels.
constexpr int kElementThreads = 256;

}  // namespace infini
