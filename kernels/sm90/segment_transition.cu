// Phase 3 of prefill on Hopper, under the delta rule: G = sigma(K)t D^-1 sigma(K), D =
// diag(sigma(K) z), of every full piece that finds a memory.
//
// Tile: GroupTransitionTile<Dk>: up to 128 rows of G and all its columns, a ring of four tiles of 64
// keys. Grid (Dk / rows, Hkv, pieces).
//
// Per tile: all warps map it in place (the B operand), while the products of the tile before run,
// and note one factor 1 / (sigma(k) z) per token; then each warp reads its 16 channels of it by
// ldmatrix.trans and weighs them in registers: the A fragments of sigma(K)t D^-1. Powers of two keep
// both in range as in the portable kernel.
//
// Shared memory: ring [4] of key tile [64 x Dk], at the end G on its way out; its mbarriers; z [Dk];
// factors [2][64].
//
// Per token and head 2 Dk^2 flops, Dk exponentials (twice at Dk = 256); reads Dk elements, writes
// 2 Dk^2 bytes per piece.
#include "common/snapshot.cuh"
#include "sm90/instantiate.h"
#include "sm90/token_ring.cuh"

namespace infini {

template <class T, int Dk>
struct SegmentTransition {
  using Shape = GroupTransitionTile<Dk>;
  static constexpr int kRows = kUpdateColumns<Dk>, kThreads = Shape::threads;
  static_assert(Shape::row_tiles == 1);
  using KeyTile = SwizzledTile<T, Shape::tokens, Dk>;
  enum { kMapK, kMapOpenK, kMaps };

  const InfiniSegmentTransition& p;
  const ptx::TensorMap* maps;
  InfiniPiece piece;
  int kv_head, row;  // the block's first of G
  TokenRing<Shape::tokens, Shape::stages> ring;

  static __device__ __forceinline__ KeyTile keys(int stage) {
    return {ptx::shared_address(dynamic_shared()) + stage * KeyTile::bytes};
  }
  static __device__ __forceinline__ float* z() {
    return reinterpret_cast<float*>(dynamic_shared() + Shape::ring_bytes + 128);
  }
  // Of two tiles, for one may be mapped while the other is weighed.
  __device__ __forceinline__ float* factors() const {
    return z() + Dk + ring.at % 2 * Shape::tokens;
  }

  // Copies of a tile.
  __device__ __forceinline__ auto load() const {
    return [this](int stage, const TokenTile& tile, uint32_t full) {
      keys(stage).load(&maps[tile.open ? kMapOpenK : kMapK],
                       token_box(p.k, piece, kv_head, tile, 0), full);
    };
  }

  // sigma of the tile in place, 0 from row `valid` on; a factor per token. Eight lanes share a row;
  // all rows of a thread are under way together.
  __device__ __forceinline__ void map_tile(float shrink, int valid) const {
    constexpr int kStep = kThreads / 8, kEach = Shape::tokens / kStep, kChunks = Dk / 64;
    const KeyTile tile = keys(ring.stage());
    const int lane = threadIdx.x % 8, first = threadIdx.x / 8;
    Chunk mapped[kEach][kChunks];
    float dot[kEach] = {};
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        mapped[i][c] = load_chunk(tile.at(first + i * kStep, lane + c * 8));
      }
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      float channels[8];
      z_chunk<Dk>(z(), lane + c * 8, channels);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        mapped[i][c] = map_chunk<T>(mapped[i][c], channels, RowScale{}, dot[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int r = first + i * kStep;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        store_chunk(tile.at(r, lane + c * 8), r < valid ? mapped[i][c] : Chunk{});
      }
      const float den = denominator(p.problem, lanes_sum<8>(dot[i]), {0.0f, shrink});
      const bool absent = den == 0.0f || r >= valid;
      if (lane == 0) factors()[r] = absent ? 0.0f : __fdividef(1.0f, den);
    }
  }

  // Rows of sigma(K)t D^-1 of 16 tokens as an A fragment.
  __device__ __forceinline__ void weigh(uint32_t (&a)[4], int token, int channel) const {
    keys(ring.stage()).a_trans(a, token, channel);
    const float* factor = factors() + token + threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 x = unpack<T>(a[i]);
      a[i] = pack<T>(x.x * factor[i / 2 * 8], x.y * factor[i / 2 * 8 + 1]);
    }
  }

  // Starts the products of the tile.
  __device__ __forceinline__ void multiply(float (&d)[Dk / 2], int warp_row) const {
    const KeyTile tile = keys(ring.stage());
    uint32_t a[Shape::tokens / 16][4];
#pragma unroll
    for (int kk = 0; kk < Shape::tokens / 16; ++kk) weigh(a[kk], kk * 16, row + warp_row);
    ptx::settle(a);
    ptx::wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < Shape::tokens / 16; ++kk) {
      ptx::Wgmma<T, Dk>::template rs<1>(d, a[kk], tile.along_rows(kk * 16), kk > 0 || ring.at > 0);
    }
    ptx::wgmma_commit_group();
  }

  __device__ __forceinline__ void consume(float shrink) {
    float d[Dk / 2];
    const int warp_row = threadIdx.x / 32 * 16;
    ring.wait();
    map_tile(shrink, ring.valid());
#pragma unroll 1
    do {
      ptx::fence_proxy_async_shared();
      __syncthreads();  // the tile is mapped, all are done with the one before
      ring.refill(KeyTile::bytes, load());
      multiply(d, warp_row);
      ++ring.at;
      if (!ring.ends()) {
        ring.wait();
        map_tile(shrink, ring.valid());
      }
      ptx::wgmma_wait_group<0>(d);
    } while (!ring.ends());
    store(d, warp_row, shrink);
  }

  // The warp's 16 rows of G, scaled so that their largest element lies in [1, 2).
  __device__ __forceinline__ void store(const float (&d)[Dk / 2], int warp_row,
                                        float shrink) const {
    float top = 0.0f;
#pragma unroll
    for (int i = 0; i < Dk / 2; ++i) top = fmaxf(top, fabsf(d[i]));
    const float scale = snapshot_scale(lanes_max<32>(top));
    const int64_t record = int64_t{blockIdx.z} * p.problem.kv_heads + kv_head;
    T* g = pointer<T>(p.g) + record * (Dk * Dk) + (row + warp_row) * Dk;
    __syncthreads();  // all are done with the ring
    const Stage<T, 64, Dk> stage{{keys(warp_row / 64).base}, warp_row % 64};
    stage.put([&](int i) { return d[i] * scale; }, {false, false});
    stage.copy(16, [&](int r) { return g + r * Dk; });
    if (threadIdx.x % 32 == 0) {
      pointer<float>(p.g_scale)[(record * Dk + row + warp_row) / 16] = shrink / scale;
    }
  }
};

template <class T, int Dk>
__device__ __forceinline__ void segment_transition(const ptx::TensorMap* maps,
                                                   const InfiniSegmentTransition& p) {
  ptx::follow();
  using Block = SegmentTransition<T, Dk>;
  using Shape = typename Block::Shape;
  const int kv_head = blockIdx.y;
  const InfiniPiece& piece = pointer<const InfiniPiece>(p.run.pieces)[blockIdx.z];
  if (!piece.full || piece.empty) return;

  const int row = blockIdx.x * Block::kRows;
  const uint32_t barriers = ptx::shared_address(dynamic_shared()) + Shape::ring_bytes;
  Block block{p, maps, piece, kv_head, row, {{piece, 0, p.problem.segment_len}, barriers}};
  block.ring.start(Block::KeyTile::bytes, block.load());
  const int64_t record = int64_t{blockIdx.z} * p.problem.kv_heads + kv_head;
  const float* z = pointer<const float>(p.z) + record * Dk;
  const float shrink = normaliser_scale<Dk>(z);
  for (int i = threadIdx.x; i < Dk; i += Shape::threads) block.z()[i] = z[z_channel<Dk>(i)] * shrink;
  __syncthreads();
  block.consume(shrink);
}

}  // namespace infini

#define INFINI_INSTANCE(dk) \
  INFINI_SM90_KEY(segment_transition, InfiniSegmentTransition, 2, GroupTransitionTile, dk)
INFINI_SM90_KEY_DIMS(INFINI_INSTANCE)
