// Local attention and retrieval of one tile of query rows: the part that segment_attention and segment
// share.
//
// A block of 4 warps owns a tile of query rows, each warp 16 * row_tiles of them with their output
// in registers. Per block of 64 keys (AttentionTile::keys):
//   1. keys have arrived (copied while the previous block was weighed); start copying the values
//   2. S = Q Kt
//   3. values have arrived, all warps have read the keys; start copying the next keys
//   4. running maxima of S; O and the sums are rescaled where one grew
//   5. 16 keys at a time: exponentials of S, in the registers that become A fragments; O += P V
// Then, in the same output registers, O <- f O + sigma(Q) M with M's snapshot streamed through the
// key and value tiles in blocks of 32 channels, and O <- e O: f and e carry the gate, the softmax
// sum and the retrieval's denominator.
//
// Shared memory (AttentionTile): query tile, key tile, value tile, z, row weights.
#pragma once

#include <cfloat>

#include "common/feature_map.cuh"
#include "common/gate.cuh"
#include "common/rotate.cuh"
#include "common/snapshot.cuh"
#include "common/tiles.h"

namespace infini {

// What the queries of a piece find: M's snapshot and z of one KV head.
template <class T>
struct Memory {
  const T* snapshot;   // [Dk][Dv]
  const float* scale;  // [Dv / 32]
  const float* z;      // [Dk]
};

template <class T, int Dk, int Dv>
struct Attention {
  using Shape = AttentionTile<Dk, Dv>;
  static constexpr int kRowTiles = Shape::row_tiles;
  static constexpr int kKeys = Shape::keys;
  static constexpr int kThreads = Shape::threads;
  static constexpr int kMemoryRows = 32;

  using QueryTile = Tile<T, Shape::rows, Dk>;
  using KeyTile = Tile<T, kKeys, Dk>;
  using ValueTile = Tile<T, kKeys, Dv>;
  using MemoryTile = Tile<T, kMemoryRows, Dv>;
  static_assert(MemoryTile::bytes <= KeyTile::bytes && MemoryTile::bytes <= ValueTile::bytes);

  // Shared memory.
  QueryTile queries;
  KeyTile keys;
  ValueTile values;
  float* z;       // [Dk]
  float* weight;  // [rows], gate over the retrieval's denominator; 0: nothing is retrieved
  float* share;   // [rows], complement of the gate over the softmax sum

  // Registers. Row i, half h of a thread is tile row `row(i, h)`.
  float o[kRowTiles][Dv / 8][4];
  float top[kRowTiles][2];  // running maximum of scores, times scale_log2
  // Running sum of exponentials; of this thread's columns until reduce().
  float total[kRowTiles][2];

  __device__ __forceinline__ explicit Attention(unsigned char* shared)
      : queries{ptx::shared_address(shared)},
        keys{queries.base + QueryTile::bytes},
        values{keys.base + KeyTile::bytes},
        z{reinterpret_cast<float*>(shared + QueryTile::bytes + KeyTile::bytes + ValueTile::bytes)},
        weight{z + Dk},
        share{weight + Shape::rows} {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        top[i][h] = -FLT_MAX;
        total[i][h] = 0.0f;
      }
#pragma unroll
      for (auto& tile : o[i]) {
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

  // ---- local branch

  using Scores = float[kRowTiles][kKeys / 8][4];
  using Weights = uint32_t[kRowTiles][4];  // A fragments of 16 columns

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

  // Columns of this thread from `visible(i, h)` on become -inf.
  template <class Visible>
  static __device__ __forceinline__ void mask(Scores& s, Visible visible) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int end = visible(i, h);
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            if (j * 8 + c >= end) s[i][j][2 * h + c] = -INFINITY;
          }
        }
      }
    }
  }

  // Raises the running maxima to those of the scores, and rescales what was summed where one grew.
  __device__ __forceinline__ void raise(const Scores& s, float scale) {
    float best[kRowTiles][2];
    bool grown = false;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float x = -INFINITY;
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j) {
          x = fmaxf(x, fmaxf(s[i][j][2 * h], s[i][j][2 * h + 1]));
        }
        best[i][h] = lanes_max<4>(x) * scale;
        grown |= best[i][h] > top[i][h];
      }
    }
    if (!__any_sync(0xffffffff, grown)) return;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        best[i][h] = fmaxf(best[i][h], top[i][h]);
        const float shrink = ptx::ex2_approx_ftz(top[i][h] - best[i][h]);
        top[i][h] = best[i][h];
        total[i][h] *= shrink;
#pragma unroll
        for (int j = 0; j < Dv / 8; ++j) {
          o[i][j][2 * h] *= shrink;
          o[i][j][2 * h + 1] *= shrink;
        }
      }
    }
  }

  // Weights of 16 keys.
  __device__ __forceinline__ void weigh(Weights& a, const Scores& s, int key, float scale) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int h = n % 2;
        const float* pair = &s[i][key / 8 + n / 2][2 * h];
        const float x = ptx::ex2_approx_ftz(fmaf(pair[0], scale, -top[i][h]));
        const float y = ptx::ex2_approx_ftz(fmaf(pair[1], scale, -top[i][h]));
        total[i][h] += x + y;
        a[i][n] = pack<T>(x, y);
      }
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

  // Starts copying keys from `start` on.
  __device__ __forceinline__ void load_keys(const Keys<T>& source, int start, int end) const {
    load_tile<kThreads>(keys, source.k, start, end);
    ptx::cp_async_commit_group();
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
      mask(s, [&](int i, int h) {
        return visible(i, h) - start - static_cast<int>(threadIdx.x) % 4 * 2;
      });
    }
    raise(s, p.scale_log2);
#pragma unroll
    for (int key = 0; key < kKeys; key += 16) {
      Weights a;
      weigh(a, s, key, p.scale_log2);
      add_product(a, values, key);
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
  }

  // Sums of exponentials over a row's four lanes.
  __device__ __forceinline__ void reduce() {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) total[i][h] = lanes_sum<4>(total[i][h]);
    }
  }

  // Natural log-sum-exp of a row; -inf where it attended nothing.
  __device__ __forceinline__ float log_sum_exp(int i, int h) const {
    return total[i][h] == 0.0f ? -INFINITY : (top[i][h] + log2f(total[i][h])) * kLn2;
  }

  // ---- outputs

  // Writes o * factor(i, h, slice of 32 columns) to `out(tile row)`, where that is not null, in
  // 16-byte pieces by way of shared memory: 16 rows per warp where keys and values lay. No warp may
  // use those.
  template <class Factor, class Out>
  __device__ __forceinline__ void store(Factor factor, Out out) const {
    const int lane = threadIdx.x % 32, stage = threadIdx.x / 32 * 16;
    const Tile<T, Shape::warps * 16, Dv> stages{keys.base};
    static_assert(decltype(stages)::bytes <= KeyTile::bytes + ValueTile::bytes);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int slice = 0; slice < Dv / 32; ++slice) {
          const float f = factor(i, h, slice);
#pragma unroll
          for (int j = slice * 4; j < slice * 4 + 4; ++j) {
            const uint32_t to = stages.at(stage + lane / 4 + h * 8, j) + lane % 4 * 4;
            const uint32_t pair =
                pack<T>(weighed(o[i][j][2 * h], f), weighed(o[i][j][2 * h + 1], f));
            ptx::st_shared(to, pair);
          }
        }
      }
      __syncwarp();
#pragma unroll 1
      for (int c = lane; c < 16 * (Dv / 8); c += 32) {
        T* to = out(first_row() + i * 16 + c / (Dv / 8));
        if (to) {
          *reinterpret_cast<Chunk*>(to + c % (Dv / 8) * 8) =
              load_chunk(stages.at(stage + c / (Dv / 8), c % (Dv / 8)));
        }
      }
      __syncwarp();
    }
  }

  // ---- retrieval

  // sigma of the raw queries in place, and each row's gate over its denominator: 0 for rows that
  // retrieve nothing, and for those from `rows` on. Synchronises before and after.
  __device__ __forceinline__ void map_queries(const InfiniProblem& p, int rows, Gate gate) {
    __syncthreads();
    infini::map_queries<kThreads>(p, queries, z, rows, [&](int row, float d, bool first) {
      if (first) weight[row] = d == 0.0f || row >= rows ? 0.0f : __fdividef(gate.memory, d);
      return d != 0.0f;
    });
    __syncthreads();
  }

  // o <- f o + sigma(Q) snapshot; the caller multiplies by e afterwards. f = local / e.
  template <class Local, class Retrieved>
  __device__ __forceinline__ void retrieve(const Memory<T>& memory, Local local,
                                           Retrieved retrieved) {
    load_memory(MemoryTile{keys.base}, memory, 0);
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
            o[i][j][2 * h] = weighed(o[i][j][2 * h], f);
            o[i][j][2 * h + 1] = weighed(o[i][j][2 * h + 1], f);
          }
        }
      }
    }
#pragma unroll 1
    for (int block = 0; block < Dk / kMemoryRows; ++block) {
      ptx::cp_async_wait_group<0>();
      __syncthreads();  // this block has arrived, all have read the one before
      const MemoryTile tile{block % 2 ? values.base : keys.base};
      if (block + 1 < Dk / kMemoryRows) {
        load_memory(MemoryTile{block % 2 ? keys.base : values.base}, memory, block + 1);
      }
#pragma unroll
      for (int row = 0; row < kMemoryRows; row += 16) {
        Weights a;
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          queries.a(a[i], first_row() + i * 16, block * kMemoryRows + row);
        }
        add_product(a, tile, row);
      }
    }
    __syncthreads();  // all have read the last block
  }

  __device__ __forceinline__ void load_memory(const MemoryTile& tile, const Memory<T>& memory,
                                              int block) const {
    const Rows<T> rows{memory.snapshot, Dv};
    load_tile<kThreads>(tile, rows, block * kMemoryRows, Dk);
    ptx::cp_async_commit_group();
  }

  // The whole end of a tile: gates, retrieves and writes. `out(tile row)`: null where there is
  // none. `reload()` brings the raw queries back where they were changed (and waits).
  // Requires reduced totals and that no copy is under way.
  template <class Out, class Reload>
  __device__ __forceinline__ void finish(const InfiniProblem& p, const Memory<T>& memory, int rows,
                                         bool retrieves, Gate gate, Out out, Reload reload) {
    each_row([&](int i, int h, int r) {
      const float w = r < rows ? gate.local : 0.0f;
      const float over = w == 0.0f || total[i][h] == 0.0f ? 0.0f : __fdividef(w, total[i][h]);
      if (threadIdx.x % 4 == 0) share[r] = over;
    });
    __syncwarp();
    for (int i = threadIdx.x; retrieves && i < Dk; i += kThreads) {
      z[i] = memory.z[z_channel<Dk>(i)];
    }
    const auto local = [&](int i, int h, int) { return share[row(i, h)]; };
    if (!retrieves) {
      store(local, out);
      return;
    }
    reload();
    map_queries(p, rows, gate);
    // Rows that retrieve nothing must not meet the memory at all: it may hold NaN.
    store(local, [&](int r) -> T* { return weight[r] == 0.0f ? out(r) : nullptr; });
    __syncthreads();
    // Bounded away from 0 so that local / retrieved stays finite; what that adds is below rounding.
    const auto retrieved = [&](int i, int h, int slice) {
      const float e = weight[row(i, h)] * inverse_scale(memory.scale[slice]);
      const float least = share[row(i, h)] * 1e-30f;
      return fabsf(e) < least ? least : e;
    };
    retrieve(memory, local, retrieved);
    store(retrieved, [&](int r) -> T* { return weight[r] == 0.0f ? nullptr : out(r); });
  }
};

}  // namespace infini
