// Tile shapes and shared-memory sizes of the Hopper kernels, and the head dimensions they are compiled
// for; rules as in common/tiles.h.
#pragma once

#include "common/tiles.h"

// (Dk, Dv) that the Hopper kernels serve, and Dk alone.
#define INFINI_SM90_HEAD_DIMS(X) X(64, 64) X(128, 128) X(256, 256)
#define INFINI_SM90_KEY_DIMS(X) X(64) X(128) X(256)

namespace infini {

// Registers of a thread at launch where `threads` of them share an SM's 65536.
constexpr int registers_of(int threads) { return 65536 / threads / 8 * 8; }

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
  // A warpgroup that asks for more than the others gave up waits for ever.
  static constexpr int launch_registers = registers_of(threads);
  static_assert(groups * consumer_registers + producer_registers ==
                (groups + 1) * launch_registers);
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
  static constexpr int launch_registers = Attention::launch_registers;
  // Columns of M that are updated at a time: all their sums fit the registers of two groups.
  static constexpr int columns = kUpdateColumns<Dv>;
  // Behind those of attention: z, column sums and their parts, factors of two tiles, one value per
  // warp, the piece, the chunk.
  static constexpr int extra_bytes = 4 * Dk + 4 * Dk + 8 * 256 + 8 * keys + 64 + 64 + 32;
  static constexpr int shared_bytes = Attention::shared_bytes + extra_bytes;
};

}  // namespace infini
