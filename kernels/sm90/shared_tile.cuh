// Tiles of 16-bit elements in shared memory as tensor copies leave them and wgmma reads them:
// strips of 64 columns, each of Rows rows of 128 bytes whose 16-byte chunks are permuted,
// chunk ^= row & 7 (the 128-byte swizzle).
#pragma once

#include "common/feature_map.cuh"
#include "sm90/wgmma.cuh"

namespace infini {

// Swizzled tiles begin at multiples of 1024 bytes. Named here, and not passed along, so that the
// compiler knows that it is shared memory, and where.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char shared[];
  return shared;
}

// Where a box begins, in elements of the tensor.
struct Box {
  int channel, head, row, batch;
};

template <class T, int Rows, int Columns>
struct SwizzledTile {
  using Element = T;
  static constexpr int rows = Rows;
  static constexpr int columns = Columns;
  static constexpr int strips = Columns / 64;
  static constexpr int strip_bytes = Rows * 128;
  static constexpr int bytes = strips * strip_bytes;
  static_assert(Columns % 64 == 0 && Rows % 8 == 0);

  uint32_t base;  // shared-memory address, a multiple of 1024

  __device__ __forceinline__ uint32_t at(int row, int chunk) const {
    return base + chunk / 8 * strip_bytes + row * 128 + (((chunk ^ row) & 7) << 4);
  }

  // 64 of its columns.
  __device__ __forceinline__ SwizzledTile<T, Rows, 64> strip(int index) const {
    return {base + index * strip_bytes};
  }

  // Operand of wgmma whose k runs along the columns, from `column` on (16 of them); its other index
  // along the rows, from `row` on (a multiple of 8).
  __device__ __forceinline__ uint64_t along_columns(int column, int row = 0) const {
    return ptx::descriptor_128(base, 16, 1024) +
           (column / 64 * strip_bytes + column % 64 * 2) / 16 + row * 128 / 16;
  }

  // Operand of wgmma whose k runs along the rows, from `row` on (16 of them); its other index along
  // the columns. Read with Trans = 1.
  __device__ __forceinline__ uint64_t along_rows(int row) const {
    return ptx::descriptor_128(base, strip_bytes, 1024) + row * 128 / 16;
  }

  // A fragment of the warp: 16 x 16 at (row, column), stored [m][k].
  __device__ __forceinline__ void a(uint32_t (&r)[4], int row, int column) const {
    const int lane = threadIdx.x % 32;
    ptx::ldmatrix_x4(r, at(row + lane % 16, column / 8 + lane / 16));
  }

  // The same of the transpose: stored [k][m], m at `column`, k at `row`.
  __device__ __forceinline__ void a_trans(uint32_t (&r)[4], int row, int column) const {
    const int lane = threadIdx.x % 32;
    ptx::ldmatrix_x4_trans(r, at(row + lane % 8 + lane / 16 * 8, column / 8 + lane / 8 % 2));
  }

  // Tensor copies of the whole tile by one thread; `barrier` expects its bytes.
  __device__ __forceinline__ void load(const ptx::TensorMap* map, const Box& box,
                                       uint32_t barrier) const {
    load_rows<Rows>(map, box, barrier);
  }

  // The same for all of `shared_by` blocks of a cluster (1 or 2), each of which brings its part of
  // the rows: a box has Rows / shared_by of them.
  __device__ __forceinline__ void load_for(int shared_by, const ptx::TensorMap* map, const Box& box,
                                           uint32_t barrier) const {
    if (shared_by == 1) {
      load(map, box, barrier);
      return;
    }
    const int row = ptx::cluster_ctarank() * (Rows / 2);
#pragma unroll
    for (int strip = 0; strip < strips; ++strip) {
      ptx::cp_async_bulk_tensor_multicast_4d(base + strip * strip_bytes + row * 128, map,
                                             box.channel + strip * 64, box.head, box.row + row,
                                             box.batch, barrier, 0b11);
    }
  }

  // The same in boxes of BoxRows rows.
  template <int BoxRows>
  __device__ __forceinline__ void load_rows(const ptx::TensorMap* map, const Box& box,
                                            uint32_t barrier) const {
#pragma unroll
    for (int strip = 0; strip < strips; ++strip) {
#pragma unroll
      for (int row = 0; row < Rows; row += BoxRows) {
        ptx::cp_async_bulk_tensor_load_4d(base + strip * strip_bytes + row * 128, map,
                                          box.channel + strip * 64, box.head, box.row + row,
                                          box.batch, barrier);
      }
    }
  }

  // Rows from `first` on become zero, by the lanes of a warp.
  __device__ __forceinline__ void clear_rows(int first) const {
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < (Rows - first) * (Columns / 8); i += 32) {
      store_chunk(at(first + i / (Columns / 8), i % (Columns / 8)), Chunk{});
    }
  }
};

// 16 rows of a warp on their way from accumulators to global memory.
template <class T, int Rows, int Columns>
struct Stage {
  SwizzledTile<T, Rows, Columns> tile;
  int row;  // the warp's first

  // Accumulators of the warp's rows, as `value(i)` makes them of accumulator i; rows of half h
  // whose `keep[h]` is set stay as they are.
  template <class Value>
  __device__ __forceinline__ void put(Value value, const bool (&keep)[2]) const {
    const int lane = ptx::tid_x() % 32;
    const bool all = !__any_sync(0xffffffff, keep[0] || keep[1]);
#pragma unroll
    for (int j = 0; j < Columns / 16; ++j) {
      const uint32_t at = tile.at(row + lane % 16, 2 * j + lane / 16);
      uint32_t r[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) r[i] = pack<T>(value(8 * j + 2 * i), value(8 * j + 2 * i + 1));
      if (!all) {
        uint32_t old[4];
        ptx::ldmatrix_x4(old, at);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4; ++i) r[i] = keep[i % 2] ? old[i] : r[i];
      }
      ptx::stmatrix_x4(at, r);
    }
    __syncwarp();
  }

  // The first `count` rows to `to(row)`, in 16-byte pieces.
  template <class To>
  __device__ __forceinline__ void copy(int count, To to) const {
#pragma unroll 1
    for (int i = ptx::tid_x() % 32; i < count * (Columns / 8); i += 32) {
      const int r = i / (Columns / 8), chunk = i % (Columns / 8);
      reinterpret_cast<Chunk*>(to(r))[chunk] = load_chunk(tile.at(row + r, chunk));
    }
    __syncwarp();
  }

  // All 16 rows by tensor copies; returns when they have been read.
  __device__ __forceinline__ void send(const ptx::TensorMap* map, const Box& box) const {
    ptx::fence_proxy_async_shared();
    __syncwarp();
    if (ptx::tid_x() % 32 == 0) {
#pragma unroll
      for (int strip = 0; strip < Columns / 64; ++strip) {
        ptx::cp_async_bulk_tensor_store_4d(map, box.channel + strip * 64, box.head, box.row,
                                           box.batch, tile.at(row, 0) + strip * tile.strip_bytes);
      }
      ptx::cp_async_bulk_commit_group();
      ptx::cp_async_bulk_wait_group_read<0>();
    }
    __syncwarp();
  }
};

}  // namespace infini
