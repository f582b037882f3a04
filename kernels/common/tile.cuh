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
  using Element = T;
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
    ptx::ldmatrix_x4_at(r, start(lane % 16, lane / 16), toggle(column), offset(row, column));
  }

  // A fragment of the transpose: stored [k][m], 16 x 16 with m at `column`, k at `row`.
  __device__ __forceinline__ void a_trans(uint32_t (&r)[4], int row, int column) const {
    const int lane = threadIdx.x % 32;
    ptx::ldmatrix_x4_trans_at(r, start(lane % 8 + lane / 16 * 8, lane / 8 % 2), toggle(column),
                              offset(row, column));
  }

  // B fragments of two n8 tiles: stored [n][k], n at `row` (16 of them), k at `column`.
  // {r0, r1}: first tile, {r2, r3}: second.
  __device__ __forceinline__ void b(uint32_t (&r)[4], int row, int column) const {
    const int lane = threadIdx.x % 32;
    ptx::ldmatrix_x4_at(r, start(lane % 8 + lane / 16 * 8, lane / 8 % 2), toggle(column),
                        offset(row, column));
  }

  // B fragments of two n8 tiles: stored [k][n], k at `row`, n at `column` (16 of them).
  __device__ __forceinline__ void b_trans(uint32_t (&r)[4], int row, int column) const {
    const int lane = threadIdx.x % 32;
    ptx::ldmatrix_x4_trans_at(r, start(lane % 16, lane / 16), toggle(column), offset(row, column));
  }

 private:
  // at(row + r, column / 8 + half) = (start(r, half) ^ toggle(column)) + offset(row, column) for
  // rows and columns that are multiples of 16: the lane's part is computed once per tile.
  static constexpr int kSwizzled = Columns % 64 == 0 ? 8 : 4;  // chunks that permute

  __device__ __forceinline__ uint32_t start(int r, int half) const { return at(r, half); }

  static __device__ __forceinline__ uint32_t toggle(int column) {
    return column / 8 % kSwizzled << 4;
  }

  static __device__ __forceinline__ uint32_t offset(int row, int column) {
    return row * (2 * Columns) + column / 8 / kSwizzled * kSwizzled * 16;
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
};

// Keys and values of a segment. Kernels hold it in shared memory, where it takes no registers
// through their main loops.
template <class T>
struct Keys {
  SegmentRows<T> k, v;
};

// Asynchronous copy of source rows `first` to `first + R` into a tile; rows from `end` on are zero
// and not read. Columns `column` on. Every thread of the block takes part; the caller commits.
template <int Threads, class T, int R, int C>
__device__ __forceinline__ void load_tile(const Tile<T, R, C>& tile, const Rows<T>& source,
                                          int first, int end, int column = 0) {
  constexpr int chunks = C / 8, step = Threads / chunks;  // rows per pass
  static_assert(step > 0);
  const int row = threadIdx.x / chunks, chunk = threadIdx.x % chunks;
  const bool idle = Threads % chunks != 0 && row >= step;
  const T* from = source.row(first + row) + column + chunk * 8;
  const int64_t stride = source.stride * step;
  const int left = end - first - row;
#pragma unroll
  for (int r = 0; r < R; r += step, from += stride) {
    if (idle || (R % step != 0 && row + r >= R)) continue;
    ptx::cp_async_16(tile.at(row + r, chunk), from, r < left);
  }
}

// The same from a segment: a tile rarely lies on both sides.
template <int Threads, class T, int R, int C>
__device__ __forceinline__ void load_tile(const Tile<T, R, C>& tile, const SegmentRows<T>& source,
                                          int first, int end, int column = 0) {
  const int cached = source.cached;
  if (first >= cached || first + R <= cached) {
    const bool open = first < cached;
    const int skip = open ? 0 : cached;
    const Rows<T> rows = *(open ? &source.open : &source.fresh);
    load_tile<Threads>(tile, rows, first - skip, end - skip, column);
    return;
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < R * (C / 8); i += Threads) {
    const int row = i / (C / 8), chunk = i % (C / 8), at = first + row;
    const T* from = at < cached ? source.open.row(at) : source.fresh.row(at - cached);
    ptx::cp_async_16(tile.at(row, chunk), from + column + chunk * 8, at < end);
  }
}

}  // namespace infini
