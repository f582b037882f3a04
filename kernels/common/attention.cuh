// Local attention of one tile of query rows: the main loop that segment_attention and segment
// share. attention_softmax.cuh weighs the scores, attention_outputs.cuh ends the tile.
//
// A block of 4 warps owns a tile of query rows, each warp 16 * row_tiles of them with their output
// in registers. Per block of 64 keys (AttentionTile::keys):
//   1. keys have arrived (copied while the previous block was weighed); start copying the values
//   2. S = Q Kt
//   3. values have arrived, all warps have read the keys; start copying the next keys
//   4. running maxima of S; O and the sums are rescaled where one grew
//   5. 16 keys at a time: exponentials of S, in the registers that become A fragments; O += P V
//
// Shared memory (AttentionTile): query tile, key tile, value tile, z, row weights.
#pragma once

#include "common/attention_softmax.cuh"
#include "common/rotate.cuh"
#include "common/tiles.h"

namespace infini {

template <class T, int Dk, int Dv>
struct Attention {
  using Shape = AttentionTile<Dk, Dv>;
  static constexpr int kRowTiles = Shape::row_tiles;
  static constexpr int kKeys = Shape::keys;
  static constexpr int kThreads = Shape::threads;

  using QueryTile = Tile<T, Shape::rows, Dk>;
  using KeyTile = Tile<T, kKeys, Dk>;
  using ValueTile = Tile<T, kKeys, Dv>;
  using RunningSoftmax = Softmax<T, kRowTiles, kKeys>;
  using Scores = typename RunningSoftmax::Scores;
  using Weights = typename RunningSoftmax::Weights;

  // Shared memory.
  QueryTile queries;
  KeyTile keys;
  ValueTile values;
  float* z;       // [Dk]
  float* weight;  // [rows], gate over the retrieval's denominator; 0: nothing is retrieved
  float* share;   // [rows], complement of the gate over the softmax sum

  // Registers. Row i, half h of a thread is tile row `row(i, h)`.
  float o[kRowTiles][Dv / 8][4];
  RunningSoftmax softmax;

  __device__ __forceinline__ explicit Attention(unsigned char* shared)
      : queries{ptx::shared_address(shared)},
        keys{queries.base + QueryTile::bytes},
        values{keys.base + KeyTile::bytes},
        z{reinterpret_cast<float*>(shared + QueryTile::bytes + KeyTile::bytes + ValueTile::bytes)},
        weight{z + Dk},
        share{weight + Shape::rows} {
#pragma unroll
    for (auto& tiles : o) {
#pragma unroll
      for (auto& tile : tiles) {
#pragma unroll
        for (float& x : tile) x = 0.0f;
      }
    }
  }

  static __device__ __forceinline__ int first_row() {
    return static_cast<int>(threadIdx.x) / 32 * (16 * kRowTiles);
  }

  static __device__ __forceinline__ int row(int i, int h) {
    return first_row() + i * 16 + static_cast<int>(threadIdx.x) % 32 / 4 + h * 8;
  }

  // `each(i, h, tile row)` for every row of this thread.
  template <class Each>
  static __device__ __forceinline__ void each_row(Each each) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) each(i, h, row(i, h));
    }
  }

  // Attention over segment rows up to `end`, the first of which load_keys has been told to bring.
  // Blocks up to row `whole` are seen whole by every query: they are not masked.
  template <class Visible, class Rotate>
  __device__ __forceinline__ void attend(const InfiniProblem& p, const Keys<T>& source, int end,
                                         int whole, Visible visible, Rotate rotate) {
    int start = 0;
#pragma unroll 1
    for (; start + kKeys <= whole; start += kKeys) {
      key_block<false>(p, source, start, end, visible, rotate);
    }
#pragma unroll 1
    for (; start < end; start += kKeys) {
      key_block<true>(p, source, start, end, visible, rotate);
    }
    __syncthreads();
    softmax.reduce();
  }

  // One block of keys from `start` on. `rotate(start)` turns keys that have just arrived, if there
  // is anything to turn, and synchronises. `visible(i, h)`: segment rows that a row sees.
  template <bool kMasked, class Visible, class Rotate>
  __device__ __forceinline__ void key_block(const InfiniProblem& p, const Keys<T>& source,
                                            int start, int end, Visible visible, Rotate rotate) {
    ptx::cp_async_wait_group<0>();
    __syncthreads();  // keys (and queries) have arrived; all are done with the values before
    load_tile<kThreads>(values, source.v, start, end);
    ptx::cp_async_commit_group();
    rotate(start);
    Scores s;
    scores(s);
    ptx::cp_async_wait_group<0>();
    __syncthreads();  // values have arrived; all have read the keys
    if (start + kKeys < end) load_keys(source, start + kKeys, end);
    if (kMasked) {
      softmax.mask(s, [&](int i, int h) {
        return visible(i, h) - start - static_cast<int>(threadIdx.x) % 4 * 2;
      });
    }
    softmax.raise(s, p.scale_log2, [&](int i, int h, float factor) { rescale(i, h, factor); });
#pragma unroll
    for (int key = 0; key < kKeys; key += 16) {
      Weights a;
      softmax.weigh(a, s, key, p.scale_log2);
      add_product(a, values, key);
    }
  }

  // Starts copying keys from `start` on.
  __device__ __forceinline__ void load_keys(const Keys<T>& source, int start, int end) const {
    load_tile<kThreads>(keys, source.k, start, end);
    ptx::cp_async_commit_group();
  }

  __device__ __forceinline__ void scores(Scores& s) const {
#pragma unroll
    for (auto& tiles : s) {
#pragma unroll
      for (auto& tile : tiles) {
#pragma unroll
        for (float& x : tile) x = 0.0f;
      }
    }
#pragma unroll
    for (int kk = 0; kk < Dk; kk += 16) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) queries.a(a[i], first_row() + i * 16, kk);
#pragma unroll
      for (int j = 0; j < kKeys / 16; ++j) {
        uint32_t b[4];
        keys.b(b, j * 16, kk);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          ptx::mma_m16n8k16<T>(s[i][2 * j], a[i], b[0], b[1]);
          ptx::mma_m16n8k16<T>(s[i][2 * j + 1], a[i], b[2], b[3]);
        }
      }
    }
  }

  __device__ __forceinline__ void rescale(int i, int h, float factor) {
#pragma unroll
    for (int j = 0; j < Dv / 8; ++j) {
      o[i][j][2 * h] *= factor;
      o[i][j][2 * h + 1] *= factor;
    }
  }

  // O += a (16 rows of `tile` from `row` on). Fragments are loaded one step ahead.
  template <class Rows>
  __device__ __forceinline__ void add_product(const Weights& a, const Rows& tile, int row) {
    uint32_t b[2][4];
    tile.b_trans(b[0], row, 0);
#pragma unroll
    for (int j = 0; j < Dv / 16; ++j) {
      if (j + 1 < Dv / 16) tile.b_trans(b[(j + 1) % 2], row, (j + 1) * 16);
      const auto& now = b[j % 2];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        ptx::mma_m16n8k16<T>(o[i][2 * j], a[i], now[0], now[1]);
        ptx::mma_m16n8k16<T>(o[i][2 * j + 1], a[i], now[2], now[3]);
      }
    }
  }
};

}  // namespace infini
