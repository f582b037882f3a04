// Phase 4 of prefill: M before every piece, as snapshot, and M after the run:
// M <- M - G M + B, serial over the pieces of a chain.
//
// Tile: ScanTile<Dk>: 32 columns of M per block, in f32 accumulators, a warp per 16 rows; the
// columns are independent. Grid (columns / 32, Hkv, chains). Per piece:
//   1. largest magnitude of the block, hence the snapshot's power of two
//   2. snapshot to shared memory (the product's operand) and to the workspace
//   3. P = G snapshot, G in panels of 32 columns through a ring of four stages that runs ahead over
//      the pieces; M <- M - P + sum of B's parts in index order. The correction is rounded, never
//      I - G.
//
// Shared memory: panels [4][Dk x 32], snapshot [Dk x 32].
//
// Per piece and head 2 Dk^2 columns flops; reads Dk^2 elements of G per block and 4 Dk columns
// bytes of B, writes 2 Dk columns bytes.
#include "common/feature_map.cuh"
#include "common/instantiate.h"
#include "common/snapshot.cuh"
#include "common/tile.cuh"

namespace infini {

template <class T, int Dk>
struct Scan {
  using Shape = ScanTile<Dk>;
  static constexpr int kThreads = Shape::threads, kStages = Shape::stages;
  static constexpr int kPanels = Dk / Shape::panel;
  using Panel = Tile<T, Dk, Shape::panel>;
  using Operand = Tile<T, Dk, Shape::columns>;
  using Accumulator = float[4][4];

  const InfiniMemoryScan& p;
  InfiniChain chain;
  int kv_head, column;
  uint32_t base;
  // Ring: the next panel to load, and the next to use.
  int load_piece, load_panel, loaded, used;

  __device__ __forceinline__ Scan(const InfiniMemoryScan& p, unsigned char* shared)
      : p(p),
        chain(pointer<const InfiniChain>(p.run.chains)[blockIdx.z]),
        kv_head(blockIdx.y),
        column(blockIdx.x * Shape::columns),
        base(ptx::shared_address(shared)),
        load_piece(chain.first_piece),
        load_panel(0),
        loaded(0),
        used(0) {}

  __device__ __forceinline__ int last() const { return chain.first_piece + chain.pieces; }
  __device__ __forceinline__ const InfiniPiece& piece(int i) const {
    return pointer<const InfiniPiece>(p.run.pieces)[i];
  }
  __device__ __forceinline__ int64_t record(int i) const {
    return int64_t{i} * p.problem.kv_heads + kv_head;
  }
  __device__ __forceinline__ bool transits(int i) const {
    return p.g && piece(i).full && !piece(i).empty;
  }
  __device__ __forceinline__ Panel panel(int n) const {
    return {base + n % kStages * Panel::bytes};
  }
  __device__ __forceinline__ Operand operand() const { return {base + kStages * Panel::bytes}; }

  static __device__ __forceinline__ int row(int h) {
    return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + h * 8;
  }
  static __device__ __forceinline__ int col(int j) { return j * 8 + threadIdx.x % 4 * 2; }

  // Starts copying the next panel, if there is one; closes a group either way.
  __device__ __forceinline__ void issue() {
    while (load_piece < last() && !transits(load_piece)) ++load_piece;
    if (load_piece < last()) {
      const Rows<T> g{pointer<const T>(p.g) + record(load_piece) * (Dk * Dk), Dk};
      load_tile<kThreads>(panel(loaded++), g, 0, Dk, load_panel * Shape::panel);
      if (++load_panel == kPanels) {
        load_panel = 0;
        ++load_piece;
      }
    }
    ptx::cp_async_commit_group();
  }

  // f(m, row, column) for the pairs of columns that this thread holds.
  template <class Each>
  static __device__ __forceinline__ void each_pair(Accumulator& m, Each each) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) each(m[j][2 * h], m[j][2 * h + 1], row(h), col(j));
    }
  }

  __device__ __forceinline__ void start(Accumulator& m) const {
    const int64_t at = (int64_t{chain.slot} * p.problem.kv_heads + kv_head) * Dk;
    each_pair(m, [&](float& x, float& y, int r, int c) {
      x = p.start_kind == INFINI_START_IDENTITY && r == column + c ? 1.0f : 0.0f;
      y = p.start_kind == INFINI_START_IDENTITY && r == column + c + 1 ? 1.0f : 0.0f;
      if (p.start_kind == INFINI_START_MEMORY && !chain.empty) {
        const float* from = pointer<const float>(p.start) + (at + r) * p.columns + column + c;
        const float2 pair = *reinterpret_cast<const float2*>(from);
        x = pair.x;
        y = pair.y;
      }
    });
  }

  // The snapshot of m into shared memory, and into global memory where asked; its scale.
  __device__ __forceinline__ float snapshot(Accumulator& m, uint64_t to, uint64_t scales,
                                            int64_t matrix) const {
    float top = 0.0f;
    each_pair(m,
              [&](float& x, float& y, int, int) { top = fmaxf(top, fmaxf(fabsf(x), fabsf(y))); });
    // Its barrier also says that all have read the operand of the piece before.
    const float scale = snapshot_scale(block_max<kThreads>(top));
    const Operand tile = operand();
    each_pair(m, [&](float& x, float& y, int r, int c) {
      const uint32_t at = tile.at(r, c / 8) + c % 8 * 2, pair = pack<T>(x * scale, y * scale);
      ptx::st_shared(at, pair);
    });
    __syncthreads();  // the operand is complete
    if (to) {
      T* rows = pointer<T>(to) + matrix * Dk * p.columns + column;
      for (int i = threadIdx.x; i < Dk * 4; i += kThreads) {
        const Chunk c = load_chunk(tile.at(i / 4, i % 4));
        // A plain store would be split.
        __stcg(reinterpret_cast<uint4*>(rows + i / 4 * p.columns + i % 4 * 8),
               uint4{c.x[0], c.x[1], c.x[2], c.x[3]});
      }
      if (threadIdx.x == 0) {
        pointer<float>(scales)[matrix * (p.columns / INFINI_SCALE_COLUMNS) + blockIdx.x] = scale;
      }
    }
    return scale;
  }

  // P = G snapshot.
  __device__ __forceinline__ void product(Accumulator& out) {
#pragma unroll 1
    for (int i = 0; i < kPanels; ++i, ++used) {
      ptx::cp_async_wait_group<kStages - 2>();
      __syncthreads();  // this panel has arrived, all are done with the one before
      issue();
      const Panel g = panel(used);
#pragma unroll
      for (int k = 0; k < Shape::panel; k += 16) {
        uint32_t a[4];
        g.a(a, threadIdx.x / 32 * 16, k);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          uint32_t b[4];
          operand().b_trans(b, i * Shape::panel + k, j * 16);
          ptx::mma_m16n8k16<T>(out[2 * j], a, b[0], b[1]);
          ptx::mma_m16n8k16<T>(out[2 * j + 1], a, b[2], b[3]);
        }
      }
    }
  }

  // B of a piece: the sum of its parts.
  __device__ __forceinline__ void load_b(Accumulator& b, int i) const {
    const float* parts = pointer<const float>(p.b) + record(i) * p.splits * Dk * p.columns + column;
    for (int s = 0; s < p.splits; ++s, parts += Dk * p.columns) {
      each_pair(b, [&](float& x, float& y, int r, int c) {
        const float2 pair = *reinterpret_cast<const float2*>(parts + r * p.columns + c);
        x += pair.x;
        y += pair.y;
      });
    }
  }

  __device__ __forceinline__ void run() {
    Accumulator m;
    start(m);
    for (int i = 0; i < kStages - 1; ++i) issue();
#pragma unroll 1
    for (int i = chain.first_piece; i < last(); ++i) {
      const float scale = snapshot(m, p.snapshot, p.snapshot_scale, record(i));
      if (!piece(i).full) continue;
      Accumulator change = {}, correction = {};
      if (p.b) load_b(change, i);
      float factor = 0.0f;
      if (transits(i)) {
        factor = pointer<const float>(p.g_scale)[record(i) * (Dk / 16) + threadIdx.x / 32] / scale;
        product(correction);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          // Where nothing is retrieved the correction is absent, not 0 times NaN.
          const float loss = factor == 0.0f ? 0.0f : correction[j][c] * factor;
          m[j][c] += change[j][c] - loss;
        }
      }
    }
    const int64_t matrix = int64_t{chain.slot} * p.problem.kv_heads + kv_head;
    if (p.end_snapshot) snapshot(m, p.end_snapshot, p.end_snapshot_scale, matrix);
    float* end = pointer<float>(p.end) + matrix * Dk * p.columns + column;
    each_pair(m, [&](float& x, float& y, int r, int c) {
      __stcg(reinterpret_cast<float2*>(end + r * p.columns + c), float2{x, y});
    });
    ptx::cp_async_wait_group<0>();
  }
};

template <class T, int Dk>
__device__ __forceinline__ void memory_scan(const InfiniMemoryScan& p, unsigned char* shared) {
  Scan<T, Dk>(p, shared).run();
}

}  // namespace infini

#define INFINI_INSTANCE(dk) INFINI_KEY(memory_scan, InfiniMemoryScan, ScanTile, dk)
INFINI_KEY_DIMS(INFINI_INSTANCE)
