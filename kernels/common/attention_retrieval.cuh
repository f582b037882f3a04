// What the queries of a tile find in the memory, in the output registers of the portable attention
// kernels: O <- f O + sigma(Q) M, with M's snapshot streamed through the key and value tiles in
// blocks of 32 channels.
#pragma once

#include "common/attention.cuh"

namespace infini {

// M's snapshot and z of one KV head.
template <class T>
struct Memory {
  const T* snapshot;   // [Dk][Dv]
  const float* scale;  // [Dv / 32]
  const float* z;      // [Dk]
};

template <class T, int Dk, int Dv>
struct Retrieval {
  using Block = Attention<T, Dk, Dv>;
  static constexpr int kThreads = Block::kThreads;
  static constexpr int kRowTiles = Block::kRowTiles;
  static constexpr int kMemoryRows = 32;

  using MemoryTile = Tile<T, kMemoryRows, Dv>;
  static_assert(MemoryTile::bytes <= Block::KeyTile::bytes &&
                MemoryTile::bytes <= Block::ValueTile::bytes);

  Block& block;
  const Memory<T>& memory;

  // sigma of the raw queries in place, and each row's gate over its denominator: 0 for rows that
  // retrieve nothing, and for those from `rows` on. Synchronises before and after.
  __device__ __forceinline__ void map_queries(const InfiniProblem& p, int rows, Gate gate) const {
    __syncthreads();
    infini::map_queries<kThreads>(
        p, block.queries, block.z, rows, [&](int row, float d, bool first) {
          if (first) {
            block.weight[row] = d == 0.0f || row >= rows ? 0.0f : __fdividef(gate.memory, d);
          }
          return d != 0.0f;
        });
    __syncthreads();
  }

  // O <- f O + sigma(Q) snapshot; the caller multiplies by e afterwards. f = local / e; `local` and
  // `retrieved` (e) of (i, h, slice of 32 columns).
  template <class Local, class Retrieved>
  __device__ __forceinline__ void add(Local local, Retrieved retrieved) const {
    load_memory(MemoryTile{block.keys.base}, 0);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int slice = 0; slice < Dv / 32; ++slice) {
          const float w = local(i, h, slice);
          const float f = w == 0.0f ? 0.0f : __fdividef(w, retrieved(i, h, slice));
#pragma unroll
          for (int j = slice * 4; j < slice * 4 + 4; ++j) {
            float(&x)[4] = block.o[i][j];
            x[2 * h] = weighed(x[2 * h], f);
            x[2 * h + 1] = weighed(x[2 * h + 1], f);
          }
        }
      }
    }
#pragma unroll 1
    for (int index = 0; index < Dk / kMemoryRows; ++index) {
      ptx::cp_async_wait_group<0>();
      __syncthreads();  // this block has arrived, all have read the one before
      const MemoryTile tile{index % 2 ? block.values.base : block.keys.base};
      if (index + 1 < Dk / kMemoryRows) {
        load_memory(MemoryTile{index % 2 ? block.keys.base : block.values.base}, index + 1);
      }
#pragma unroll
      for (int row = 0; row < kMemoryRows; row += 16) {
        typename Block::Weights a;
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          block.queries.a(a[i], Block::first_row() + i * 16, index * kMemoryRows + row);
        }
        block.add_product(a, tile, row);
      }
    }
    __syncthreads();  // all have read the last block
  }

  // Starts copying a block of the snapshot.
  __device__ __forceinline__ void load_memory(const MemoryTile& tile, int index) const {
    const Rows<T> rows{memory.snapshot, Dv};
    load_tile<kThreads>(tile, rows, index * kMemoryRows, Dk);
    ptx::cp_async_commit_group();
  }
};

}  // namespace infini
