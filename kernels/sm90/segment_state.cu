// Phase 1 of prefill on Hopper: B = sigma(K)t V and the column sums of sigma(K) of every full
// piece.
//
// Tile: GroupStateTile<Dk, Dv>: all channels of K and up to 128 columns of V; the first thread keeps
// a ring of tiles of 64 tokens full (token_ring.cuh). Grid (splits, Hkv * Dv / columns, pieces).
//
// K never goes back to shared memory: each warp reads its 16 channels of a tile by ldmatrix.trans,
// maps them in registers, adds them to the column sums, and has the A fragments of sigma(K)t; V is
// the B operand as it lies.
//
// Shared memory: ring [stages] of key tile [64 x Dk] and value tile [64 x columns]; an mbarrier per
// stage: full (the first thread, bytes).
//
// Per token and head 2 Dk Dv flops and Dk exponentials; reads Dk + Dv elements once (Dk twice at
// Dv = 256, the second time from L2), writes 4 Dk (Dv + 1) bytes per split: memory bounds it.
#include "sm90/instantiate.h"
#include "sm90/token_ring.cuh"

namespace infini {

template <class T, int Dk, int Dv>
struct SegmentState {
  static constexpr int kColumns = kUpdateColumns<Dv>;
  using Shape = GroupStateTile<Dk, Dv>;
  using KeyTile = SwizzledTile<T, Shape::tokens, Dk>;
  using ValueTile = SwizzledTile<T, Shape::tokens, kColumns>;
  using Fragments = uint32_t[Shape::tokens / 16][4];
  static constexpr int kStageBytes = KeyTile::bytes + ValueTile::bytes;
  static_assert(kStageBytes == Shape::stage_bytes);
  enum { kMapK, kMapV, kMapOpenK, kMapOpenV, kMaps };

  const InfiniSegmentState& p;
  const ptx::TensorMap* maps;
  InfiniPiece piece;
  int kv_head, column;
  TokenRing<Shape::tokens, Shape::stages> ring;

  static __device__ __forceinline__ KeyTile keys(int stage) {
    return {ptx::shared_address(dynamic_shared()) + stage * kStageBytes};
  }
  static __device__ __forceinline__ ValueTile values(int stage) {
    return {keys(stage).base + KeyTile::bytes};
  }

  // Copies of a tile.
  __device__ __forceinline__ auto load() const {
    return [this](int stage, const TokenTile& tile, uint32_t full) {
      keys(stage).load(&maps[tile.open ? kMapOpenK : kMapK],
                       token_box(p.k, piece, kv_head, tile, 0), full);
      values(stage).load(&maps[tile.open ? kMapOpenV : kMapV],
                         token_box(p.v, piece, kv_head, tile, column), full);
    };
  }

  // sigma(K)t of a tile's tokens and a warp's 16 channels as A fragments. Whole: all tokens count,
  // else those from `valid` on are 0.
  template <bool Whole>
  __device__ __forceinline__ void map_keys(Fragments& a, int channel, int valid,
                                           float (&sums)[2]) const {
#pragma unroll
    for (int kk = 0; kk < Shape::tokens / 16; ++kk) {
      keys(ring.stage()).a_trans(a[kk], kk * 16, channel);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 x = unpack<T>(a[kk][i]);
        const int k = kk * 16 + threadIdx.x % 4 * 2 + i / 2 * 8;
        a[kk][i] = pack<T>(Whole || k < valid ? sigma(x.x) : 0.0f,
                           Whole || k + 1 < valid ? sigma(x.y) : 0.0f);
        const float2 rounded = unpack<T>(a[kk][i]);
        sums[i % 2] += rounded.x + rounded.y;
      }
    }
  }

  __device__ __forceinline__ void consume(float* b, float* column_sums) {
    float d[Shape::row_tiles][kColumns / 2] = {}, sums[Shape::row_tiles][2] = {};
    const int channel = threadIdx.x / 128 * (64 * Shape::row_tiles) + threadIdx.x / 32 % 4 * 16;
#pragma unroll 1
    for (; !ring.ends(); ++ring.at) {
      __syncthreads();  // all are done with the tile before
      ring.refill(kStageBytes, load());
      const int valid = ring.valid();
      const ValueTile v = values(ring.stage());
      ring.wait();
      if (valid < Shape::tokens) {
        // What the copy finds behind the segment must not reach a product, not even times 0.
        if (threadIdx.x < 32) v.clear_rows(valid);
        ptx::fence_proxy_async_shared();
        __syncthreads();
      }
#pragma unroll
      for (int r = 0; r < Shape::row_tiles; ++r) {
        Fragments a;
        if (valid >= Shape::tokens) {
          map_keys<true>(a, channel + r * 64, valid, sums[r]);
        } else {
          map_keys<false>(a, channel + r * 64, valid, sums[r]);
        }
        ptx::settle(a);
        ptx::wgmma_fence();
#pragma unroll
        for (int kk = 0; kk < Shape::tokens / 16; ++kk) {
          ptx::Wgmma<T, kColumns>::template rs<1>(d[r], a[kk], v.along_rows(kk * 16), 1);
        }
        ptx::wgmma_commit_group();
        ptx::wgmma_wait_group<0>(d[r]);
      }
    }
    store(b, column_sums, channel, d, sums);
  }

  __device__ __forceinline__ void store(float* b, float* column_sums, int channel,
                                        const float (&d)[Shape::row_tiles][kColumns / 2],
                                        const float (&sums)[Shape::row_tiles][2]) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < Shape::row_tiles; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = channel + r * 64 + lane / 4 + h * 8;
        float* to = b + int64_t{row} * Dv + column + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < kColumns / 8; ++j) {
          *reinterpret_cast<float2*>(to + j * 8) = {d[r][4 * j + 2 * h], d[r][4 * j + 2 * h + 1]};
        }
        const float sum = lanes_sum<4>(sums[r][h]);
        if (column == 0 && lane % 4 == 0) column_sums[row] = sum;
      }
    }
  }
};

template <class T, int Dk, int Dv>
__device__ __forceinline__ void segment_state(const ptx::TensorMap* maps,
                                              const InfiniSegmentState& p) {
  ptx::follow();
  using Block = SegmentState<T, Dk, Dv>;
  using Shape = typename Block::Shape;
  constexpr int kSlices = Dv / Block::kColumns;
  const int split = blockIdx.x, kv_head = blockIdx.y / kSlices, slice = blockIdx.y % kSlices;
  const InfiniPiece& piece = pointer<const InfiniPiece>(p.run.pieces)[blockIdx.z];
  if (!piece.full) return;

  const int first = split * p.split_len, end = min(first + p.split_len, p.problem.segment_len);
  const uint32_t barriers = ptx::shared_address(dynamic_shared()) + Shape::ring_bytes;
  Block block{p, maps, piece, kv_head, slice * Block::kColumns, {{piece, first, end}, barriers}};
  block.ring.start(Block::kStageBytes, block.load());
  const int64_t record = (int64_t{blockIdx.z} * p.problem.kv_heads + kv_head) * p.splits + split;
  block.consume(pointer<float>(p.b) + record * (Dk * Dv), pointer<float>(p.sums) + record * Dk);
}

}  // namespace infini

#define INFINI_INSTANCE(dk, dv) \
  INFINI_SM90_HEAD(segment_state, InfiniSegmentState, 4, GroupStateTile, dk, dv)
INFINI_SM90_HEAD_DIMS(INFINI_INSTANCE)
