// Rings of stages between one producer warp and the consumer warps.
#pragma once

#include "sm90/shared_tile.cuh"

namespace infini {

// Where one side stands in a ring: in one register, for there are several rings.
template <int Stages>
struct Cursor {
  static_assert((Stages & (Stages - 1)) == 0);
  uint32_t count = 0;  // of stages it has passed

  __device__ __forceinline__ int stage() const { return count % Stages; }
  __device__ __forceinline__ uint32_t parity() const { return count / Stages % 2; }
  __device__ __forceinline__ void advance() { ++count; }
};

// Per stage two mbarriers: `full`, one arrival, that of the producer, and the bytes it announces;
// `empty`, one arrival per consumer warp. Where two blocks of a cluster share what they load
// (`shared_by` 2), the consumers of both arrive at the `empty` of both.
template <int Stages>
struct Ring {
  static constexpr int bytes = 16 * Stages;

  uint32_t barriers;  // shared-memory address
  int shared_by = 1;

  __device__ __forceinline__ uint32_t full(int stage) const { return barriers + 8 * stage; }
  __device__ __forceinline__ uint32_t empty(int stage) const {
    return barriers + 8 * (Stages + stage);
  }

  __device__ __forceinline__ void init(int consumer_warps) const {
    for (int stage = 0; stage < Stages; ++stage) {
      ptx::mbarrier_init(full(stage), 1);
      ptx::mbarrier_init(empty(stage), consumer_warps * shared_by);
    }
  }

  // Producer: waits until the stage is free. A fresh barrier passes: it counts as completed for
  // parity 1.
  __device__ __forceinline__ void acquire(const Cursor<Stages>& at) const {
    ptx::mbarrier_wait_parity(empty(at.stage()), at.parity() ^ 1);
  }

  // Consumer: waits until the stage is filled.
  __device__ __forceinline__ void wait(const Cursor<Stages>& at) const {
    ptx::mbarrier_wait_parity(full(at.stage()), at.parity());
  }

  // Consumer warp: done with the stage.
  __device__ __forceinline__ void release(const Cursor<Stages>& at) const {
    __syncwarp();
    const int lane = threadIdx.x % 32;
    if (lane == 0) ptx::mbarrier_arrive(empty(at.stage()));
    if (shared_by > 1 && lane == 1) {
      const uint32_t other = ptx::cluster_ctarank() ^ 1;
      ptx::mbarrier_arrive_cluster(ptx::mapa(empty(at.stage()), other));
    }
  }
};

// What the producer does about stages of which only the first rows belong to the segment: whatever
// the copy finds behind those must not reach a product, not even multiplied by 0. Such a stage
// arrives at a barrier of the producer's own (one per stage: another block's part of the next may
// come early), which clears the rows and then announces it.
template <int Stages>
struct TailCleaner {
  static constexpr int bytes = 8 * Stages;

  uint32_t barriers;  // shared-memory address
  uint32_t parities = 0;

  __device__ __forceinline__ void init() const {
    for (int stage = 0; stage < Stages; ++stage) ptx::mbarrier_init(barriers + 8 * stage, 1);
  }

  // Fills a stage of `bytes` bytes by `load(barrier)`, called by one lane; rows of `tile` from
  // `valid` on become zero. All lanes of the producer warp take part.
  template <class Tile, class Load>
  __device__ __forceinline__ void fill(const Ring<Stages>& ring, const Cursor<Stages>& at,
                                       int bytes, const Tile& tile, int valid, Load load) {
    const bool leader = threadIdx.x % 32 == 0, whole = valid >= Tile::rows;
    const int stage = at.stage();
    const uint32_t full = ring.full(stage), own = barriers + 8 * stage;
    if (leader) {
      const uint32_t arrival = whole ? full : own;
      ptx::mbarrier_arrive_expect_tx(arrival, bytes);
      load(arrival);
    }
    if (whole) return;
    ptx::mbarrier_wait_parity(own, parities >> stage & 1);
    parities ^= 1 << stage;
    tile.clear_rows(valid);
    ptx::fence_proxy_async_shared();
    __syncwarp();
    if (leader) ptx::mbarrier_arrive(full);
  }
};

}  // namespace infini
