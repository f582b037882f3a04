// A ring of tiles of tokens that its users refill themselves: the block's first thread copies the
// next tile to where all have finished reading.
#pragma once

#include "sm90/token_tiles.cuh"

namespace infini {

template <int Tokens, int Stages>
struct TokenRing {
  static constexpr int bytes = 8 * Stages;  // one mbarrier per stage: its tile has arrived

  TokenTiles<Tokens> tiles;
  uint32_t barriers;  // shared-memory address
  int count, at = 0;  // tiles, and the one in use

  __device__ __forceinline__ TokenRing(const TokenTiles<Tokens>& tiles, uint32_t barriers)
      : tiles(tiles), barriers(barriers), count(tiles.count()) {}

  __device__ __forceinline__ bool ends() const { return at == count; }
  __device__ __forceinline__ int stage() const { return at % Stages; }
  __device__ __forceinline__ int valid() const { return tiles.at(at).valid; }
  __device__ __forceinline__ uint32_t full(int tile) const { return barriers + tile % Stages * 8; }

  // First thread: `load(stage, tile, barrier)` starts copies of `tile_bytes` bytes in all.
  template <class Load>
  __device__ __forceinline__ void fetch(int tile, int tile_bytes, Load load) const {
    ptx::mbarrier_arrive_expect_tx(full(tile), tile_bytes);
    load(tile % Stages, tiles.at(tile), full(tile));
  }

  // Fills the ring; a barrier of the block must follow.
  template <class Load>
  __device__ __forceinline__ void start(int tile_bytes, Load load) const {
    if (threadIdx.x > 0) return;
    for (int stage = 0; stage < Stages; ++stage) ptx::mbarrier_init(full(stage), 1);
    ptx::fence_mbarrier_init();
    for (int tile = 0; tile < min(Stages, count); ++tile) fetch(tile, tile_bytes, load);
  }

  // Behind a barrier of the block, when all are done with the tile before this one.
  template <class Load>
  __device__ __forceinline__ void refill(int tile_bytes, Load load) const {
    const int tile = at - 1 + Stages;
    if (threadIdx.x == 0 && at > 0 && tile < count) fetch(tile, tile_bytes, load);
  }

  // Until the tile has arrived.
  __device__ __forceinline__ void wait() const {
    ptx::mbarrier_wait_parity(full(at), at / Stages % 2);
  }
};

}  // namespace infini
