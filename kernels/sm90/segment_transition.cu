// Phase 3 of prefill on Hopper, under the delta rule: G = sigma(K)t D^-1 sigma(K), D =
// diag(sigma(K) z), of every full piece that finds a memory.
//
// Tile: GroupTransitionTile<Dk>: up to 128 rows of G and all its columns; a producer warp keeps a
// ring of four tiles of 64 keys full. Grid (Dk / rows, Hkv, pieces).
//
// Per tile: all consumers map it in place (the B operand) and note one factor 1 / (sigma(k) z) per
// token; then each warp reads its 16 channels of it by ldmatrix.trans and weighs them in registers:
// the A fragments of sigma(K)t D^-1. Powers of two keep both in range as in the portable kernel.
//
// Shared memory: ring [4] of key tile [64 x Dk], at the end G on its way out; mbarriers: full (the
// producer, bytes), empty (every consumer warp); z [Dk]; factors [4][64]. Named barrier 1: a tile
// is mapped.
//
// Per token and head 2 Dk^2 flops, Dk exponentials (twice at Dk = 256); reads Dk elements, writes
// 2 Dk^2 bytes per piece.
#include "common/snapshot.cuh"
#include "sm90/instantiate.h"
#include "sm90/pipeline.cuh"
#include "sm90/token_tiles.cuh"

namespace infini {

template <class T, int Dk>
struct SegmentTransition {
  using Shape = GroupTransitionTile<Dk>;
  static constexpr int kRows = kUpdateColumns<Dk>, kThreads = 128 * Shape::groups;
  static_assert(Shape::row_tiles == 1);
  using KeyTile = SwizzledTile<T, Shape::tokens, Dk>;
  enum { kMapK, kMapOpenK, kMaps };

  const InfiniSegmentTransition& p;
  InfiniPiece piece;
  int kv_head, row;  // the block's first of G
  TokenTiles<Shape::tokens> tiles;
  uint32_t base = ptx::shared_address(dynamic_shared());
  float* z = reinterpret_cast<float*>(dynamic_shared() + Shape::ring_bytes + 128);
  Cursor<Shape::stages> at;

  __device__ __forceinline__ KeyTile keys(int stage) const {
    return {base + stage * KeyTile::bytes};
  }
  __device__ __forceinline__ float* factors() const { return z + Dk + at.stage() * Shape::tokens; }
  __device__ __forceinline__ Ring<Shape::stages> ring() const { return {base + Shape::ring_bytes}; }

  __device__ __forceinline__ void produce(const ptx::TensorMap* maps) {
#pragma unroll 1
    for (int i = 0; i < tiles.count(); ++i, at.advance()) {
      const TokenTile tile = tiles.at(i);
      ring().acquire(at);
      if (threadIdx.x % 32 == 0) {
        const uint32_t full = ring().full(at.stage());
        ptx::mbarrier_arrive_expect_tx(full, KeyTile::bytes);
        keys(at.stage())
            .load(&maps[tile.open ? kMapOpenK : kMapK], token_box(p.k, piece, kv_head, tile, 0),
                  full);
      }
    }
  }

  // The tile in place; a factor per token, 0 for those from `valid` on.
  __device__ __forceinline__ void map_tile(const InfiniProblem& problem, int valid) {
    float* factor = factors();
    map_keys<kThreads>(problem, keys(at.stage()), z, valid, [&](int r, float den, bool first) {
      if (first) factor[r] = den == 0.0f || r >= valid ? 0.0f : 1.0f / den;
    });
    ptx::fence_proxy_async_shared();
    ptx::bar_sync(1, kThreads);
  }

  // Rows of sigma(K)t D^-1 of 16 tokens as an A fragment.
  __device__ __forceinline__ void weigh(uint32_t (&a)[4], int token, int channel) const {
    keys(at.stage()).a_trans(a, token, channel);
    const float* factor = factors() + token + threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 x = unpack<T>(a[i]);
      const float f = factor[i / 2 * 8], g = factor[i / 2 * 8 + 1];
      a[i] = pack<T>(f == 0.0f ? 0.0f : x.x * f, g == 0.0f ? 0.0f : x.y * g);
    }
  }

  __device__ __forceinline__ void consume(float shrink) {
    InfiniProblem problem = p.problem;
    problem.epsilon *= shrink;
    float d[Dk / 2] = {};
    const int warp_row = threadIdx.x / 32 * 16;
#pragma unroll 1
    for (int i = 0; i < tiles.count(); ++i, at.advance()) {
      ring().wait(at);
      map_tile(problem, tiles.at(i).valid);
      uint32_t a[Shape::tokens / 16][4];
#pragma unroll
      for (int kk = 0; kk < Shape::tokens / 16; ++kk) weigh(a[kk], kk * 16, row + warp_row);
      ptx::settle(a);
      ptx::wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < Shape::tokens / 16; ++kk) {
        ptx::Wgmma<T, Dk>::template rs<1>(d, a[kk], keys(at.stage()).along_rows(kk * 16), 1);
      }
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<0>(d);
      ring().release(at);
    }
    store(d, warp_row, shrink);
  }

  // The warp's 16 rows of G, scaled so that their largest element lies in [1, 2).
  __device__ __forceinline__ void store(const float (&d)[Dk / 2], int warp_row,
                                        float shrink) const {
    float top = 0.0f;
#pragma unroll
    for (float x : d) top = fmaxf(top, fabsf(x));
    const float scale = snapshot_scale(lanes_max<32>(top));
    const int64_t record = int64_t{blockIdx.z} * p.problem.kv_heads + kv_head;
    T* g = pointer<T>(p.g) + record * (Dk * Dk) + (row + warp_row) * Dk;
    ptx::bar_sync(1, kThreads);  // all are done with the ring
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
  using Block = SegmentTransition<T, Dk>;
  using Shape = typename Block::Shape;
  const int kv_head = blockIdx.y;
  const InfiniPiece& piece = pointer<const InfiniPiece>(p.run.pieces)[blockIdx.z];
  if (!piece.full || piece.empty) return;

  const int row = blockIdx.x * Block::kRows;
  Block block{p, piece, kv_head, row, {piece, 0, p.problem.segment_len}};
  const int64_t record = int64_t{blockIdx.z} * p.problem.kv_heads + kv_head;
  const float* z = pointer<const float>(p.z) + record * Dk;
  const float shrink = normaliser_scale<Dk>(z);
  for (int i = threadIdx.x; i < Dk; i += Shape::threads) block.z[i] = z[z_channel<Dk>(i)] * shrink;
  if (threadIdx.x == 0) {
    block.ring().init(4 * Shape::groups);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x >= Block::kThreads) {
    if (Shape::reallocates) ptx::setmaxnreg_dec<Shape::producer_registers>();
    if (threadIdx.x % 128 < 32) block.produce(maps);
  } else {
    if (Shape::reallocates) ptx::setmaxnreg_inc<Shape::consumer_registers>();
    block.consume(shrink);
  }
}

}  // namespace infini

#define INFINI_INSTANCE(dk) \
  INFINI_SM90_KEY(segment_transition, InfiniSegmentTransition, 2, GroupTransitionTile, dk)
INFINI_SM90_KEY_DIMS(INFINI_INSTANCE)
