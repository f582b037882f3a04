// What a run of tokens adds to the memory, transposed: dMt = Vt sigma(K) - Rt sigma(K) with
// Rt = Mt sigma(K)t / (sigma(K) z), in one f32 accumulator; V - R is never rounded.
//
// A warp owns 16 columns v of M and all of Dk: dMt [16 x Dk] in registers, and under the delta rule
// Mt [16 x Dk] as well. Rt [16 x 16 tokens] leaves the tensor cores in the layout of the A operand
// of Rt sigma(K), so both products chain without shared memory. Per tile of 64 tokens:
//   1. the tile has arrived, all are done with the one before; start copying the next
//   2. sigma in place, one factor 1 / (sigma(k) z) per token
//   3. all of the tile is mapped; products
//
// Shared memory (UpdateTile): key tiles [2], value tiles [2], z, factors.
#pragma once

#include "common/sequence.cuh"
#include "common/snapshot.cuh"
#include "common/tiles.h"

namespace infini {

// `Accumulated` of the Dk columns of dMt, from `key` on, where all of them would not fit the
// registers.
template <class T, int Dk, int Columns, int Threads, int Accumulated = Dk>
struct Update {
  using Shape = UpdateTile<Dk, Columns>;
  static constexpr int kTokens = Shape::tokens;
  static constexpr int kWarps = Columns / 16;
  static constexpr int kPairs = Dk / 2, kGroups = Threads / kPairs;  // of the column sums
  static constexpr int kMemoryRows = 32;

  using KeyTile = Tile<T, kTokens, Dk>;
  using ValueTile = Tile<T, kTokens, Columns>;

  // Shared memory.
  KeyTile keys;      // of stage 0
  ValueTile values;  // of stage 0
  float* z;          // [Dk]
  float* factor;     // [64]

  // Registers of a warp that owns columns.
  int key;
  float d[Accumulated / 8][4];  // dMt: rows v, columns k
  float2 sums;              // column sums of sigma(K): of one pair of columns, every kGroups rows
  uint32_t mt[Dk / 16][4];  // Mt snapshot, under the delta rule
  float memory_scale;       // what mt is divided by, negated

  __device__ __forceinline__ explicit Update(unsigned char* shared, int key = 0)
      : keys{ptx::shared_address(shared)},
        values{keys.base + 2 * KeyTile::bytes},
        z{reinterpret_cast<float*>(shared + 2 * (KeyTile::bytes + ValueTile::bytes))},
        factor{z + Dk},
        key(key),
        sums{0.0f, 0.0f} {
#pragma unroll
    for (auto& tile : d) {
#pragma unroll
      for (float& x : tile) x = 0.0f;
    }
  }

  static __device__ __forceinline__ int warp() { return threadIdx.x / 32; }
  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  static __device__ __forceinline__ bool owns() {
    return Threads == 32 * kWarps || warp() < kWarps;
  }

  __device__ __forceinline__ KeyTile key_tile(int stage) const {
    return {keys.base + stage * KeyTile::bytes};
  }
  __device__ __forceinline__ ValueTile value_tile(int stage) const {
    return {values.base + stage * ValueTile::bytes};
  }

  // Columns `column` on of a snapshot [Dk][columns] into registers, by way of the value tiles.
  __device__ __forceinline__ void load_memory(const T* snapshot, const float* scale, int columns,
                                              int column) {
    using Block = Tile<T, kMemoryRows, Columns>;
    const Block block{values.base};
#pragma unroll
    for (int first = 0; first < Dk; first += kMemoryRows) {
      __syncthreads();
      load_tile<Threads>(block, Rows<T>{snapshot, columns}, first, Dk, column);
      ptx::cp_async_commit_group();
      ptx::cp_async_wait_group<0>();
      __syncthreads();
      if (!owns()) continue;
#pragma unroll
      for (int k = 0; k < kMemoryRows; k += 16) {
        block.a_trans(mt[(first + k) / 16], k, warp() * 16);
      }
    }
    memory_scale =
        owns() ? -inverse_scale(scale[(column + warp() * 16) / INFINI_SCALE_COLUMNS]) : 0.0f;
    __syncthreads();
  }

  // Adds the tokens `first` to `end`. `load(stage, token)` copies the values of a tile (or
  // nothing), `prepare(stage)` may turn the mapped tile further, between barriers; `inverse(den)` is
  // the factor of a token. `unit`: by what z was multiplied.
  template <bool kDelta, class Load, class Inverse, class Prepare>
  __device__ __forceinline__ void run(const InfiniProblem& p, const SegmentRows<T>& k, int first,
                                      const int& end, const float& unit, bool delta, bool sum,
                                      Load load, Inverse inverse, Prepare prepare) {
    if (first >= end) return;
    load_tile<Threads>(key_tile(0), k, first, end);
    load(0, first);
    ptx::cp_async_commit_group();
    int stage = 0;
#pragma unroll 1
    for (int start = first; start < end; start += kTokens, stage ^= 1) {
      ptx::cp_async_wait_group<0>();
      __syncthreads();  // the tile has arrived, all are done with the other
      if (start + kTokens < end) {
        load_tile<Threads>(key_tile(stage ^ 1), k, start + kTokens, end);
        load(stage ^ 1, start + kTokens);
      }
      ptx::cp_async_commit_group();
      map_keys<Threads>(p, key_tile(stage), z, unit, end - start,
                        [&](int row, float den, bool first_lane) {
                          if (first_lane) factor[row] = inverse(den);
                        });
      __syncthreads();  // the tile is mapped
      prepare(stage);
      if (sum) add_sums(stage);
      if (owns()) add<kDelta>(stage, delta);
    }
    __syncthreads();
  }

  __device__ __forceinline__ void add_sums(int stage) {
    const int pair = threadIdx.x % kPairs, group = threadIdx.x / kPairs;
    if (group >= kGroups) return;
    const KeyTile k = key_tile(stage);
#pragma unroll 8
    for (int row = group; row < kTokens; row += kGroups) {
      const uint32_t x = ptx::ld_shared(k.at(row, pair / 4) + pair % 4 * 4);
      const float2 values = unpack<T>(x);
      sums.x += values.x;
      sums.y += values.y;
    }
  }

  // dMt += (V - R)t sigma(K) of one tile.
  template <bool kDelta>
  __device__ __forceinline__ void add(int stage, bool delta) {
    const KeyTile k = key_tile(stage);
    const ValueTile v = value_tile(stage);
#pragma unroll 1
    for (int token = 0; token < kTokens; token += 16) {
      uint32_t a[4], r[4];
      v.a_trans(a, token, warp() * 16);
      if (kDelta && delta) retrieve(r, k, token);
#pragma unroll
      for (int j = 0; j < Accumulated / 16; ++j) {
        uint32_t b[4];
        k.b_trans(b, token, key + j * 16);
        ptx::mma_m16n8k16<T>(d[2 * j], a, b[0], b[1]);
        ptx::mma_m16n8k16<T>(d[2 * j + 1], a, b[2], b[3]);
        if (kDelta && delta) {
          ptx::mma_m16n8k16<T>(d[2 * j], r, b[0], b[1]);
          ptx::mma_m16n8k16<T>(d[2 * j + 1], r, b[2], b[3]);
        }
      }
    }
  }

  // -Rt of 16 tokens as an A operand.
  __device__ __forceinline__ void retrieve(uint32_t (&r)[4], const KeyTile& k, int token) const {
    float rt[2][4] = {};
#pragma unroll
    for (int kk = 0; kk < Dk; kk += 16) {
      uint32_t b[4];
      k.b(b, token, kk);
      ptx::mma_m16n8k16<T>(rt[0], mt[kk / 16], b[0], b[1]);
      ptx::mma_m16n8k16<T>(rt[1], mt[kk / 16], b[2], b[3]);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float* f = factor + token + n * 8 + lane() % 4 * 2;
      const float x = f[0] * memory_scale, y = f[1] * memory_scale;
      r[2 * n] = pack<T>(absent(rt[n][0], x), absent(rt[n][1], y));
      r[2 * n + 1] = pack<T>(absent(rt[n][2], x), absent(rt[n][3], y));
    }
  }

  static __device__ __forceinline__ float absent(float x, float f) {
    return f == 0.0f ? 0.0f : x * f;
  }

  // dM as f32 [Dk][columns], columns `column` on: whole sectors, 8 columns of 4 rows at a time.
  __device__ __forceinline__ void store(float* to, int columns, int column) const {
    if (!owns()) return;
    to += int64_t{key} * columns + column + warp() * 16 + lane() / 4;
#pragma unroll
    for (int j = 0; j < Accumulated / 8; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        to[int64_t{j * 8 + lane() % 4 * 2 + c % 2} * columns + c / 2 * 8] = d[j][c];
      }
    }
  }

  // Column sums of sigma(K), f32 [Dk], by way of the key tiles.
  __device__ __forceinline__ void store_sums(float* to, unsigned char* shared) const {
    float2* parts = reinterpret_cast<float2*>(shared);
    if (threadIdx.x < kGroups * kPairs) parts[threadIdx.x] = sums;
    __syncthreads();
    for (int pair = threadIdx.x; pair < kPairs; pair += Threads) {
      float2 sum = parts[pair];
      for (int group = 1; group < kGroups; ++group) {
        sum.x += parts[group * kPairs + pair].x;
        sum.y += parts[group * kPairs + pair].y;
      }
      reinterpret_cast<float2*>(to)[pair] = sum;
    }
  }
};

}  // namespace infini
