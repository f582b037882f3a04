// Phase 3 of prefill under the delta rule: G = sigma(K)t D^-1 sigma(K), D = diag(sigma(K) z), of
// every full piece that finds a memory.
//
// Tile: UpdateTile<Dk, columns> with W = D^-1 sigma(K) in the place of V: the same product, a warp
// per 16 columns of G. Grid (Dk / columns, Hkv, pieces).
//
// Powers of two keep the 16-bit operands in range: z is divided by the one that brings its largest
// channel into [1, 2), so that W is of the order of 1 / Dk whatever the keys' scale, and the 16
// rows of G that a warp holds by the one that brings their largest element there. g_scale undoes
// both.
//
// Shared memory: two stages of key and W tiles, z, factors; at the end G on its way out.
//
// Per token and head 2 Dk^2 flops; reads Dk elements, writes 2 Dk^2 bytes per piece.
#include "common/instantiate.h"
#include "common/piece.cuh"
#include "common/snapshot.cuh"
#include "common/update.cuh"

namespace infini {

template <class T, int Dk, int Columns, int Threads>
struct Transition {
  using Product = Update<T, Dk, Columns, Threads>;

  // Rows of the mapped tile times their factors, columns `column` on, into the value tile.
  static __device__ __forceinline__ void weigh(const Product& update, int stage, int column) {
    constexpr int chunks = Columns / 8;
    const auto k = update.key_tile(stage);
    const auto w = update.value_tile(stage);
#pragma unroll 1
    for (int i = threadIdx.x; i < Product::kTokens * chunks; i += Threads) {
      // Eight lanes take four chunks of two rows that the swizzles of both tiles keep apart.
      const int pair = i / 8 / (chunks / 4), row = (pair / 4 * 8 + pair % 4) ^ (i / 4 % 2 * 5);
      const int chunk = i / 8 % (chunks / 4) * 4 + i % 4;
      float x[8];
      widen<T>(load_chunk(k.at(row, column / 8 + chunk)), x);
#pragma unroll
      for (float& value : x) value = Product::absent(value, update.factor[row]);
      store_chunk(w.at(row, chunk), narrow<T>(x));
    }
    __syncthreads();  // W is complete
  }

  // A warp's 16 rows of G, scaled and rounded, to rows `column` on of `to` [Dk][Dk], by way of
  // shared memory; the power of two they were multiplied by.
  static __device__ __forceinline__ float store(const Product& update, T* to, int column) {
    float top = 0.0f;
#pragma unroll
    for (const auto& tile : update.d) {
#pragma unroll
      for (float x : tile) top = fmaxf(top, fabsf(x));
    }
    const float scale = snapshot_scale(lanes_max<32>(top));
    const Tile<T, Columns, Dk> stage{update.keys.base};
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16;
#pragma unroll
    for (int j = 0; j < Dk / 8; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t at = stage.at(first + lane / 4 + h * 8, j) + lane % 4 * 4;
        const uint32_t pair = pack<T>(update.d[j][2 * h] * scale, update.d[j][2 * h + 1] * scale);
        ptx::st_shared(at, pair);
      }
    }
    __syncwarp();
    for (int i = lane; i < 16 * (Dk / 8); i += 32) {
      const int row = first + i / (Dk / 8), chunk = i % (Dk / 8);
      reinterpret_cast<Chunk*>(to + int64_t{column + row} * Dk)[chunk] =
          load_chunk(stage.at(row, chunk));
    }
    return scale;
  }
};

template <class T, int Dk>
__device__ __forceinline__ void segment_transition(const InfiniSegmentTransition& p,
                                                   unsigned char* shared) {
  constexpr int kColumns = kUpdateColumns<Dk>;
  constexpr int kThreads = UpdateTile<Dk, kColumns>::threads;
  using Block = Transition<T, Dk, kColumns, kThreads>;
  const int column = blockIdx.x * kColumns, kv_head = blockIdx.y;
  const InfiniPiece& piece = pointer<const InfiniPiece>(p.run.pieces)[blockIdx.z];
  if (!piece.full || piece.empty) return;

  const int64_t record = int64_t{blockIdx.z} * p.problem.kv_heads + kv_head;
  const float* z = pointer<const float>(p.z) + record * Dk;
  typename Block::Product update(shared);
  const float unit = normaliser_scale<Dk>(z);
  for (int i = threadIdx.x; i < Dk; i += kThreads) {
    update.z[i] = z[z_channel<Dk>(i)] * unit;
  }

  const SegmentRows<T> k = keys_of<T>(p.problem, p.k, p.state, piece, kv_head);
  update.template run<false>(
      p.problem, k, 0, piece.cached + piece.len, unit, false, false, [](int, int) {},
      [](float den) { return den == 0.0f ? 0.0f : 1.0f / den; },
      [&](int stage) { Block::weigh(update, stage, column); });

  const float scale = Block::store(update, pointer<T>(p.g) + record * (Dk * Dk), column);
  if (threadIdx.x % 32 == 0) {
    const float g_scale = unit / scale;
    pointer<float>(p.g_scale)[record * (Dk / 16) + column / 16 + threadIdx.x / 32] = g_scale;
  }
}

template <int Dk>
using TransitionTile = UpdateTile<Dk, kUpdateColumns<Dk>>;

}  // namespace infini

#define INFINI_INSTANCE(dk) \
  INFINI_KEY(segment_transition, InfiniSegmentTransition, TransitionTile, dk)
INFINI_KEY_DIMS(INFINI_INSTANCE)
