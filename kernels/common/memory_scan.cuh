// Phase 4 of prefill: M before every piece, as snapshot, and M after the run:
// M <- M - G M + B, serial over the pieces of a chain.
//
// Tile: ScanTile<Dk>: 32 columns of M per block, in f32 accumulators, a warp per 16 rows; the
// columns are independent. Grid (columns / 32, Hkv, chains). Per piece:
//   1. largest magnitude of the block, hence the snapshot's power of two
//   2. snapshot to shared memory (the product's operand) and to the workspace
//   3. P = G snapshot; M <- M - P + sum of B's parts in index order. The correction is rounded,
//      never I - G.
// The operand is written with the power of two of the piece before, which seldom changes, beside the
// largest magnitudes of the warps: one barrier per piece, and two where it has changed.
//
// Loads run ahead: B of the next piece into registers, four columns at a time (`columns`), its lines
// into L2 some pieces before; G, in panels of 32 columns of which each warp loads its own rows, into
// a ring.
//
// Shared memory: panels [panels][Dk x 32]; operands of two pieces [2][Dk x 32].
//
// Per piece and head 2 Dk^2 columns flops; reads Dk^2 elements of G per block and 4 Dk columns
// bytes of B, writes 2 Dk columns bytes.
#pragma once

#include "common/chain.cuh"
#include "common/feature_map.cuh"
#include "common/snapshot.cuh"
#include "common/tile.cuh"
#include "common/tiles.h"

namespace infini {

template <class T, int Dk>
struct Scan {
  using Shape = ScanTile<Dk>;
  static constexpr int kThreads = Shape::threads, kRing = Shape::panels;
  static constexpr int kPanels = Dk / 32;  // of a piece
  // Pieces whose panels the ring holds, if only some of one.
  static constexpr int kRingPieces = kRing > kPanels ? kRing / kPanels : 1;
  static constexpr bool kWhole = kRing > kPanels;
  static_assert(kRing % kPanels == 0 || kPanels % kRing == 0);
  // Parts of B that are loaded ahead, and pieces that their lines are.
  static constexpr int kAhead = Dk > 192 ? 1 : 2, kFar = 3;
  using Panel = Tile<T, Dk, 32>;
  using Operand = Tile<T, Dk, Shape::columns>;
  // Of tile j of 8 columns: rows lane / 4 and lane / 4 + 8.
  using Accumulator = float[4][4];

  const InfiniMemoryScan& p;
  InfiniChain chain;
  int full;  // pieces that complete a segment
  int kv_head, column;
  uint32_t base;  // of shared memory
  // What this thread reads next: its rows of B and of G, the scale of the latter, a row of B that is
  // far ahead; and where it writes the snapshot. Elements from piece to piece.
  const float *b, *g_scale, *far;
  const T* g;
  T* snapshot;
  int64_t b_step, g_step, snapshot_step;

  __device__ __forceinline__ Scan(const InfiniMemoryScan& p, unsigned char* shared)
      : p(p),
        chain(pointer<const InfiniChain>(p.run.chains)[blockIdx.z]),
        full(full_pieces(p.run, chain)),
        kv_head(blockIdx.y),
        column(blockIdx.x * Shape::columns),
        base(ptx::shared_address(shared)) {
    const int64_t first = record(0), heads = p.problem.kv_heads;
    const float* part = pointer<const float>(p.b) + first * p.splits * Dk * p.columns + column;
    b = part + row() * p.columns + columns(0);
    far = part + threadIdx.x * p.columns;
    g = pointer<const T>(p.g) + (first * Dk + row()) * Dk + threadIdx.x % 4 * 8;
    g_scale = pointer<const float>(p.g_scale) + first * (Dk / 16) + threadIdx.x / 32;
    snapshot = rows_of(p.snapshot, first);
    b_step = heads * p.splits * Dk * p.columns;
    g_step = heads * (Dk * Dk);
    snapshot_step = heads * Dk * p.columns;
  }

  // Pieces are counted from the chain's first.
  __device__ __forceinline__ int64_t record(int i) const {
    return int64_t{chain.first_piece + i} * p.problem.kv_heads + kv_head;
  }
  __device__ __forceinline__ bool transits(int i) const {
    return p.g && i < full && !(chain.empty && i == 0);
  }
  // Snapshots of a matrix, from what this thread holds of its first row on.
  __device__ __forceinline__ T* rows_of(uint64_t snapshots, int64_t matrix) const {
    return pointer<T>(snapshots) + (matrix * Dk + row()) * p.columns + column + columns(0);
  }

  static __device__ __forceinline__ int row() {
    return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  }
  // The first of four neighbouring columns that a thread holds in tiles 2 w and 2 w + 1: the product
  // does not mind that columns are permuted.
  static __device__ __forceinline__ int columns(int w) { return w * 16 + threadIdx.x % 4 * 4; }

  // ---- G

  __device__ __forceinline__ Panel panel(int i, int n) const {
    return {base + (i % kRingPieces * kPanels + n) % kRing * Panel::bytes};
  }

  // Starts copying the warp's rows of panel n of piece i, which may lie in a later one; `from`: this
  // thread's in piece i. Closes a group either way.
  __device__ __forceinline__ void fetch(const T* from, int i, int n) const {
    const int later = n / kPanels;
    if (transits(i + later)) {
      const Panel to = panel(i, n);
      from += later * g_step + n % kPanels * 32;
      ptx::cp_async_16(to.at(row(), threadIdx.x % 4), from, true);
      ptx::cp_async_16(to.at(row() + 8, threadIdx.x % 4), from + 8 * Dk, true);
    }
    ptx::cp_async_commit_group();
  }

  // Later panels into the place of panels `first` to `end` of piece i, which the warp has read.
  __device__ __forceinline__ void refill(int i, int first, int end) const {
    __syncwarp();
#pragma unroll
    for (int n = first; n < end; ++n) fetch(g, i, n + kRing);
  }

  // Until the next panel has arrived, or, where the ring holds them, the next piece's.
  static __device__ __forceinline__ void wait() {
    ptx::cp_async_wait_group<kRing - (kWhole ? kPanels : 1)>();
    __syncwarp();
  }

  // ---- B

  using Parts = float4[kAhead][4];

  static __device__ __forceinline__ void add(float4& x, const float4& y) {
    x = {x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w};
  }

  // Of a part what this thread holds in half n % 2 of tiles n / 2 * 2 and the next.
  __device__ __forceinline__ float4 load(int part, int n) const {
    const float* from = b + part * (Dk * p.columns) + n % 2 * 8 * p.columns + n / 2 * 16;
    return *reinterpret_cast<const float4*>(from);
  }

  // The first parts.
  __device__ __forceinline__ void load(Parts& parts) const {
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
#pragma unroll
      for (int n = 0; n < 4; ++n) parts[s][n] = s < p.splits ? load(s, n) : float4{};
    }
  }

  // The others, and all of them added to the first.
  __device__ __forceinline__ void sum(Parts& parts) const {
#pragma unroll
    for (int s = 1; s < kAhead; ++s) {
#pragma unroll
      for (int n = 0; n < 4; ++n) add(parts[0][n], parts[s][n]);
    }
#pragma unroll 1
    for (int s = kAhead; s < p.splits; ++s) {
#pragma unroll
      for (int n = 0; n < 4; ++n) add(parts[0][n], load(s, n));
    }
  }

  // Starts the lines of piece i, the next of them, on their way to L2.
  __device__ __forceinline__ void prefetch(int i) {
    if (!p.b || i >= full) return;
    const float* line = far;
#pragma unroll 1
    for (int r = threadIdx.x; r < p.splits * Dk; r += kThreads, line += kThreads * p.columns) {
      ptx::prefetch_l2(line);
    }
    far += b_step;
  }

  // ---- M

  // f(four neighbouring values, row, column) for all that a thread holds.
  template <class Each>
  static __device__ __forceinline__ void each_four(Accumulator& m, Each each) {
#pragma unroll
    for (int w = 0; w < 2; ++w) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float4 x{m[2 * w][2 * h], m[2 * w][2 * h + 1], m[2 * w + 1][2 * h],
                 m[2 * w + 1][2 * h + 1]};
        each(x, row() + h * 8, columns(w));
        m[2 * w][2 * h] = x.x;
        m[2 * w][2 * h + 1] = x.y;
        m[2 * w + 1][2 * h] = x.z;
        m[2 * w + 1][2 * h + 1] = x.w;
      }
    }
  }

  __device__ __forceinline__ void start(Accumulator& m) const {
    const int64_t at = (int64_t{chain.slot} * p.problem.kv_heads + kv_head) * Dk;
    each_four(m, [&](float4& x, int r, int c) {
      x = {};
      if (p.start_kind == INFINI_START_IDENTITY) {
        const int one = r - column - c;
        x = {one == 0 ? 1.0f : 0.0f, one == 1 ? 1.0f : 0.0f, one == 2 ? 1.0f : 0.0f,
             one == 3 ? 1.0f : 0.0f};
      } else if (p.start_kind == INFINI_START_MEMORY && !chain.empty) {
        x = *reinterpret_cast<const float4*>(pointer<const float>(p.start) + (at + r) * p.columns +
                                             column + c);
      }
    });
  }

  // ---- snapshot

  // m times `scale`, rounded: pairs of tile j, half h.
  struct Rounded {
    uint32_t pairs[4][2];
    float scale;

    __device__ __forceinline__ Rounded(const Accumulator& m, float scale) : scale(scale) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          pairs[j][h] = pack<T>(m[j][2 * h] * scale, m[j][2 * h + 1] * scale);
        }
      }
    }
  };

  __device__ __forceinline__ Operand operand(int i) const {
    return {base + kRing * Panel::bytes + i % 2 * Operand::bytes};
  }

  static __device__ __forceinline__ void put(const Operand& to, const Rounded& x) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        ptx::st_shared(to.at(row() + h * 8, j) + threadIdx.x % 4 * 4, x.pairs[j][h]);
      }
    }
  }

  // Largest magnitude in the warp.
  static __device__ __forceinline__ uint32_t warp_top(const Accumulator& m) {
    float top[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      top[j] = fmaxf(fmaxf(fabsf(m[j][0]), fabsf(m[j][1])), fmaxf(fabsf(m[j][2]), fabsf(m[j][3])));
    }
    const float all = fmaxf(fmaxf(top[0], top[1]), fmaxf(top[2], top[3]));
    // NaN has not got here, unless all is NaN; the order of what has is that of its bits.
    return __reduce_max_sync(0xffffffff, __float_as_uint(fmaxf(all, 0.0f)));
  }

  // The snapshot of m, and the same as operand i; `guess`: its power of two, if that has not changed.
  __device__ __forceinline__ Rounded round(const Accumulator& m, int i, float guess) const {
    __shared__ uint32_t tops[2][Shape::warps];
    const int lane = threadIdx.x % 32;
    const uint32_t top = warp_top(m);
    if (lane == 0) tops[i % 2][threadIdx.x / 32] = top;
    Rounded rounded(m, guess);
    put(operand(i), rounded);
    __syncthreads();  // complete; all are done with the one before
    const uint32_t all = __reduce_max_sync(0xffffffff, tops[i % 2][lane % Shape::warps]);
    const float scale = snapshot_scale(__uint_as_float(all));
    if (scale != guess) {
      rounded = Rounded(m, scale);
      put(operand(i), rounded);
      __syncthreads();
    }
    return rounded;
  }

  // The snapshot into global memory, this thread's from `to` on.
  __device__ __forceinline__ void save(const Rounded& x, T* to, uint64_t scales,
                                       int64_t matrix) const {
#pragma unroll
    for (int w = 0; w < 2; ++w) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        // A plain store would be split.
        __stcg(reinterpret_cast<uint2*>(to + h * 8 * p.columns + w * 16),
               uint2{x.pairs[2 * w][h], x.pairs[2 * w + 1][h]});
      }
    }
    if (threadIdx.x == 0) {
      pointer<float>(scales)[matrix * (p.columns / INFINI_SCALE_COLUMNS) + blockIdx.x] = x.scale;
    }
  }

  // ---- a piece

  // P = G snapshot.
  __device__ __forceinline__ void product(Accumulator& out, int i) const {
    const int lane = threadIdx.x % 32;
    const uint32_t m = operand(i).at(lane % 16, lane / 16);
    const uint32_t g_rows = panel(i, 0).at(threadIdx.x / 32 * 16 + lane % 16, lane / 16);
#pragma unroll
    for (int n = 0; n < kPanels; ++n) {
      if (!kWhole && n > 0) wait();
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        uint32_t a[4];
        ptx::ldmatrix_x4(a, (g_rows ^ s * 32) + n % kRing * Panel::bytes);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          uint32_t b[4];
          ptx::ldmatrix_x4_trans(b, (m ^ j * 32) + (n * 32 + s * 16) * 64);
          ptx::mma_m16n8k16<T>(out[2 * j], a, b[0], b[1]);
          ptx::mma_m16n8k16<T>(out[2 * j + 1], a, b[2], b[3]);
        }
      }
      if constexpr (!kWhole) refill(i, n, n + 1);
    }
    if constexpr (kWhole) refill(i, 0, kPanels);
  }

  // m += change - loss correction.
  static __device__ __forceinline__ void update(Accumulator& m, const float4 (&change)[4],
                                                const Accumulator& correction, float loss) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const float x[4] = {change[n].x, change[n].y, change[n].z, change[n].w};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int j = n / 2 * 2 + c / 2, at = n % 2 * 2 + c % 2;
        m[j][at] += x[c] - correction[j][at] * loss;
      }
    }
  }

  __device__ __forceinline__ void run() {
    for (int i = 0; i < kFar; ++i) prefetch(i);
    // Where the first piece has no G the ring begins with the second.
    const int first = chain.empty ? 1 : 0;
    for (int n = 0; n < kRing; ++n) fetch(g + first * g_step, first, n);
    Parts parts = {};
    if (p.b && full > 0) load(parts);
    Accumulator m;
    start(m);
    float guess = 1.0f, next_factor = transits(0) ? *g_scale : 0.0f;
#pragma unroll 1
    for (int i = 0; i < full; ++i) {
      prefetch(i + kFar);
      g_scale += p.problem.kv_heads * (Dk / 16);
      const float factor = next_factor;
      next_factor = transits(i + 1) ? *g_scale : 0.0f;
      wait();
      const Rounded rounded = round(m, i, guess);
      guess = rounded.scale;
      Accumulator correction = {};
      if (transits(i)) product(correction, i);
      if (p.snapshot) save(rounded, snapshot, p.snapshot_scale, record(i));
      if (p.b) sum(parts);
      update(m, parts[0], correction, factor * inverse_scale(rounded.scale));
      b += b_step;
      g += g_step;
      snapshot += snapshot_step;
      if (p.b && i + 1 < full) load(parts);
    }
    finish(m, guess);
  }

  __device__ __forceinline__ void finish(Accumulator& m, float guess) const {
    const int64_t matrix = int64_t{chain.slot} * p.problem.kv_heads + kv_head;
    const Rounded rounded = round(m, full, guess);
    if (p.snapshot && full < chain.pieces) {
      save(rounded, snapshot, p.snapshot_scale, record(full));
    }
    if (p.end_snapshot) {
      save(rounded, rows_of(p.end_snapshot, matrix), p.end_snapshot_scale, matrix);
    }
    float* end = pointer<float>(p.end) + matrix * Dk * p.columns + column;
    each_four(m, [&](float4& x, int r, int c) {
      __stcg(reinterpret_cast<float4*>(end + r * p.columns + c), x);
    });
    ptx::cp_async_wait_group<0>();
  }
};

template <class T, int Dk>
__device__ __forceinline__ void memory_scan(const InfiniMemoryScan& p, unsigned char* shared) {
  Scan<T, Dk>(p, shared).run();
}

}  // namespace infini
