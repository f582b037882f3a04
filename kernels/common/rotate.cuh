// Rotary position embedding of the local branch: f32 arithmetic, rounded to T. The first 2 * half
// channels rotate, the others pass; pairs are (i, i + half) or, interleaved, (2i, 2i + 1).
#pragma once

#include "common/feature_map.cuh"

namespace infini {

// Sets bits of the status word.
__device__ __forceinline__ void report(uint64_t status, uint32_t bits) {
  atomicOr(pointer<uint32_t>(status), bits);
}

// Table row of token `token` of the token dimension; `position` when none is given.
__device__ __forceinline__ int64_t position_of(const InfiniRope& rope, int64_t batch, int64_t token,
                                               int64_t position) {
  if (!rope.positions) return position;
  return pointer<const int64_t>(rope.positions)[batch * rope.positions_batch + token];
}

// A row of the tables.
struct Angles {
  const float* cos;
  const float* sin;
};

// False, and reported, for a position outside the tables.
__device__ __forceinline__ bool angles_of(const InfiniRope& rope, int64_t position, uint64_t status,
                                          Angles& angles) {
  if (position < 0 || position >= rope.rows) {
    report(status, INFINI_STATUS_POSITION);
    return false;
  }
  angles = {pointer<const float>(rope.cos) + position * rope.cos_stride,
            pointer<const float>(rope.sin) + position * rope.sin_stride};
  return true;
}

__device__ __forceinline__ void rotate_pair(float& x, float& y, float cos, float sin) {
  const float a = x, b = y;
  x = a * cos - b * sin;
  y = b * cos + a * sin;
}

// Independent parts that a row's rotation has: 16-byte chunks (pairs of them) where the pairing and
// the tables' alignment allow it, single pairs otherwise.
__device__ __forceinline__ bool by_chunks(const InfiniRope& rope) {
  const int64_t tables = rope.cos | rope.sin | 4 * (rope.cos_stride | rope.sin_stride);
  return tables % 16 == 0 && rope.half % (rope.interleaved ? 4 : 8) == 0;
}

__device__ __forceinline__ int rotation_parts(const InfiniRope& rope) {
  if (!by_chunks(rope)) return rope.half;
  return rope.half / (rope.interleaved ? 4 : 8);
}

// Rotates pairs (x[i * Step], y[i * Step]) by the angles of channels `first` to `first + 4`.
template <int Step>
__device__ __forceinline__ void rotate_four(float* x, float* y, const Angles& angles, int first) {
  const float4 cos = *reinterpret_cast<const float4*>(angles.cos + first);
  const float4 sin = *reinterpret_cast<const float4*>(angles.sin + first);
  rotate_pair(x[0], y[0], cos.x, sin.x);
  rotate_pair(x[Step], y[Step], cos.y, sin.y);
  rotate_pair(x[2 * Step], y[2 * Step], cos.z, sin.z);
  rotate_pair(x[3 * Step], y[3 * Step], cos.w, sin.w);
}

// Rotates one part of a row. Row: chunk(i), set_chunk(i, Chunk), element(i), set_element(i, T).
template <class T, class Row>
__device__ __forceinline__ void rotate_part(const InfiniRope& rope, const Angles& angles, int part,
                                            const Row& row) {
  if (!by_chunks(rope)) {
    const int i = rope.interleaved ? 2 * part : part;
    const int j = rope.interleaved ? 2 * part + 1 : part + rope.half;
    float x = static_cast<float>(row.element(i)), y = static_cast<float>(row.element(j));
    rotate_pair(x, y, angles.cos[part], angles.sin[part]);
    row.set_element(i, static_cast<T>(x));
    row.set_element(j, static_cast<T>(y));
  } else if (rope.interleaved) {
    float x[8];
    widen<T>(row.chunk(part), x);
    rotate_four<2>(x, x + 1, angles, 4 * part);
    row.set_chunk(part, narrow<T>(x));
  } else {
    float x[8], y[8];
    widen<T>(row.chunk(part), x);
    widen<T>(row.chunk(part + rope.half / 8), y);
    rotate_four<1>(x, y, angles, 8 * part);
    rotate_four<1>(x + 4, y + 4, angles, 8 * part + 4);
    row.set_chunk(part, narrow<T>(x));
    row.set_chunk(part + rope.half / 8, narrow<T>(y));
  }
}

// A row of a tile in shared memory.
template <class Tile>
struct TileRow {
  using T = typename Tile::Element;
  Tile tile;
  int row;

  __device__ __forceinline__ Chunk chunk(int i) const { return load_chunk(tile.at(row, i)); }
  __device__ __forceinline__ void set_chunk(int i, const Chunk& c) const {
    store_chunk(tile.at(row, i), c);
  }
  __device__ __forceinline__ T element(int i) const {
    uint16_t bits;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(bits) : "r"(at(i)) : "memory");
    T x;
    memcpy(&x, &bits, 2);
    return x;
  }
  __device__ __forceinline__ void set_element(int i, T x) const {
    uint16_t bits;
    memcpy(&bits, &x, 2);
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(at(i)), "h"(bits) : "memory");
  }

 private:
  __device__ __forceinline__ uint32_t at(int i) const { return tile.at(row, i / 8) + i % 8 * 2; }
};

// A row in global memory, read at one place and written at another.
template <class T>
struct GlobalRow {
  const T* from;
  T* to;

  __device__ __forceinline__ Chunk chunk(int i) const {
    return reinterpret_cast<const Chunk*>(from)[i];
  }
  __device__ __forceinline__ void set_chunk(int i, const Chunk& c) const {
    reinterpret_cast<Chunk*>(to)[i] = c;
  }
  __device__ __forceinline__ T element(int i) const { return from[i]; }
  __device__ __forceinline__ void set_element(int i, T x) const { to[i] = x; }
};

struct Turn {
  int row, part;
};

// The i-th part of `rows` rows (a multiple of eight) of `parts` parts each, in an order in which
// eight lanes meet chunks in different banks: lanes take the parts of a row, then those of the next
// but one, two or four; in rows of 64 or 192 bytes pairs of parts of rows r, r + 1, r + 4, r + 5.
template <int C>
__device__ __forceinline__ Turn turn_of(int i, int rows, int parts) {
  if constexpr (C % 64 == 0) {
    const int row = i / parts;
    return {(row & ~7) + static_cast<int>(__brev(row & 7) >> 29), i % parts};
  } else {
    const int pair = parts % 2 == 0 ? 2 : 1, row = i / pair % rows;
    return {(row & ~6) | (row & 2) << 1 | (row & 4) >> 1, i / pair / rows * pair + i % pair};
  }
}

// Rotates rows `first` to `last` of a tile in place; `position(row)` gives table rows. A row
// outside the tables stays as it is. `Threads` threads take part, of which this is `thread`; the
// caller synchronises before and after.
template <int Threads, class Tile, class Position>
__device__ __forceinline__ void rotate_tile(const Tile& tile, int first, int last,
                                            const InfiniRope& rope, uint64_t status,
                                            Position position, int thread = threadIdx.x) {
  const int parts = rotation_parts(rope), start = first & ~7, end = (last + 7) & ~7;
#pragma unroll 1
  for (int i = thread; i < (end - start) * parts; i += Threads) {
    const Turn turn = turn_of<Tile::columns>(i, end - start, parts);
    const int row = start + turn.row;
    Angles angles;
    if (row >= first && row < last && angles_of(rope, position(row), status, angles)) {
      rotate_part<typename Tile::Element>(rope, angles, turn.part, TileRow<Tile>{tile, row});
    }
  }
}

// Rotates a row of `columns` channels from one place in global memory to another, by `Lanes`
// lanes of which this is `lane`; the channels that pass are copied.
template <int Lanes, class T>
__device__ __forceinline__ void rotate_row(const GlobalRow<T>& row, int columns,
                                           const InfiniRope& rope, int64_t position,
                                           uint64_t status, int lane) {
  Angles angles;
  const bool inside = angles_of(rope, position, status, angles);
  const int parts = inside ? rotation_parts(rope) : 0, rotated = inside ? 2 * rope.half : 0;
  for (int i = lane; i < parts; i += Lanes) rotate_part<T>(rope, angles, i, row);
  const int chunk = (rotated + 7) / 8;
  for (int i = rotated + lane; i < min(8 * chunk, columns); i += Lanes) {
    row.set_element(i, row.element(i));
  }
  for (int i = chunk + lane; i < columns / 8; i += Lanes) row.set_chunk(i, row.chunk(i));
}

}  // namespace infini
