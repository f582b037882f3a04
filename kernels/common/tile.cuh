// Tiles of T in shared memory, and their loads: row-major, 16-byte chunks swizzled so that
// ldmatrix (eight rows, one chunk column) and row-wise accesses are free of bank conflicts.
//
// Rows of a multiple of 128 bytes: chunk ^= row & 7. Rows of 64 or 192 bytes: the row itself moves
// every second row by half the banks, chunk ^= (row >> 1) & 3 does the rest.
#pragma once

#include "common/ptx.cuh"

namespace infini {

template <class T, int Rows, int Columns>
struct Tile {
  static constexpr int rows = Rows;
  static constexpr int columns = Columns;
  static constexpr int chunks = Columns / 8;
  static constexpr int bytes = 2 * Rows * Columns;
  static_assert(Columns % 32 == 0, "the swizzle permutes four or eight chunks");

  uint32_t base;  // shared-memory address, a multiple of 128

  __device__ __forceinline__ uint32_t at(int row, int chunk) const {
    const int mask = Columns % 64 == 0 ? row & 7 : (row >> 1) & 3;
    return base + row * (2 * Columns) + ((chunk ^ mask) << 4);
  }

  // A fragment, 16 x 16 at (row, column): stored [m][k].
  __device__ __forceinline__ void a(uint32_t (&r)[4], int row, int column) const {
    const int lane = threadIdx.x % 32;
    ptx::ldmatrix_x4(r, at(row + lane % 16, column / 8 + lane / 16));
  }

  // A fragment of the transpose: stored [k][m], 16 x 16 with m at `column`, k at `row`.
  __device__ __forceinline__ void a_trans(uint32_t (&r)[4], int row, int column) const {
    const int lane = threadIdx.x % 32;
    ptx::ldmatrix_x4_trans(r, at(row + lane % 8 + lane / 16 * 8, column / 8 + lane / 8 % 2));
  }

  // B fragments of two n8 tiles: stored [n][k], n at `row` (16 of them), k at `column`.
  // {r0, r1}: first tile, {r2, r3}: second.
  __device__ __forceinline__ void b(uint32_t (&r)[4], int row, int column) const {
    const int lane = threadIdx.x % 32;
    ptx::ldmatrix_x4(r, at(row + lane % 8 + lane / 16 * 8, column / 8 + lane / 8 % 2));
  }

  // B fragments of two n8 tiles: stored [k][n], k at `row`, n at `column` (16 of them).
  __device__ __forceinline__ void b_trans(uint32_t (&r)[4], int row, int column) const {
    const int lane = threadIdx.x % 32;
    ptx::ldmatrix_x4_trans(r, at(row + lane % 16, column / 8 + lane / 16));
  }
};

// Rows of one head of a tensor.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;

  __device__ __forceinline__ const T* row(int64_t i) const { return data + i * stride; }
};

// Rows of one segment: `cached` rows in the open segment, the others among the call's new tokens.
template <class T>
struct SegmentRows {
  Rows<T> open;
  Rows<T> fresh;
  int cached;

  __device__ __forceinline__ const T* row(int i) const {
    return i < cached ? open.row(i) : fresh.row(i - cached);
  }
};

// Asynchronous copy of rows `first` to `first + tile.rows` into a tile; rows from `end` on are zero
// and not read. Columns `column` on. Every thread of the block takes part; the caller commits.
template <int Threads, class T, int R, int C, class Source>
__device__ __forceinline__ void load_tile(const Tile<T, R, C>& tile, const Source& source,
                                          int first, int end, int column = 0) {
  constexpr int chunks = Tile<T, R, C>::chunks;
#pragma unroll 4
  for (int i = threadIdx.x; i < R * chunks; i += Threads) {
    const int row = i / chunks, chunk = i % chunks;
    const bool inside = first + row < end;
    const T* from = source.row(inside ? first + row : 0) + column + chunk * 8;
    ptx::cp_async_16(tile.at(row, chunk), from, inside);
  }
}

}  // namespace infini
