// The end of a tile of the portable attention kernels: gate, retrieval (attention_retrieval.cuh)
// and the way of the outputs from registers to global memory.
//
// Both branches share the output registers: O <- f O + sigma(Q) M, then O <- e O; f and e carry the
// gate, the softmax sum and the retrieval's denominator.
#pragma once

#include "common/attention_retrieval.cuh"

namespace infini {

template <class T, int Dk, int Dv>
struct AttentionOutputs {
  using Block = Attention<T, Dk, Dv>;
  using Shape = typename Block::Shape;

  Block& block;

  // The whole end of a tile: gates, retrieves and writes. `out(tile row)`: null where there is
  // none. `reload()` brings the raw queries back where they were changed (and waits).
  // Requires that no copy is under way.
  template <class Out, class Reload>
  __device__ __forceinline__ void finish(const InfiniProblem& p, const Memory<T>& memory, int rows,
                                         bool retrieves, Gate gate, Out out, Reload reload) const {
    const Retrieval<T, Dk, Dv> retrieval{block, memory};
    const auto& weight = block.weight;
    const auto& share = block.share;
    Block::each_row([&](int i, int h, int r) {
      const float over = over_total(r < rows ? gate.local : 0.0f, block.softmax.total[i][h]);
      if (threadIdx.x % 4 == 0) share[r] = over;
    });
    __syncwarp();
    for (int i = threadIdx.x; retrieves && i < Dk; i += Block::kThreads) {
      block.z[i] = memory.z[z_channel<Dk>(i)];
    }
    const auto local = [&](int i, int h, int) { return share[Block::row(i, h)]; };
    if (!retrieves) {
      store(local, out);
      return;
    }
    reload();
    retrieval.map_queries(p, rows, gate);
    // Rows that retrieve nothing must not meet the memory at all: it may hold NaN.
    store(local, [&](int r) -> T* { return weight[r] == 0.0f ? out(r) : nullptr; });
    __syncthreads();
    float top = 0.0f;  // of all rows: one for each would not fit the registers
#pragma unroll
    for (const auto& tiles : block.o) {
#pragma unroll
      for (const auto& tile : tiles) {
#pragma unroll
        for (float x : tile) top = fmaxf(top, fabsf(x));
      }
    }
    const auto retrieved = [&](int i, int h, int slice) {
      const int r = Block::row(i, h);
      return retrieved_share(weight[r], memory.scale[slice], least_share(share[r], top));
    };
    retrieval.add(local, retrieved);
    store(retrieved, [&](int r) -> T* { return weight[r] == 0.0f ? nullptr : out(r); });
  }

  // Writes o * factor(i, h, slice of 32 columns) to `out(tile row)`, where that is not null, in
  // 16-byte pieces by way of shared memory: 16 rows per warp where keys and values lay. No warp may
  // use those.
  template <class Factor, class Out>
  __device__ __forceinline__ void store(Factor factor, Out out) const {
    const int lane = threadIdx.x % 32, stage = threadIdx.x / 32 * 16;
    const Tile<T, Shape::warps * 16, Dv> stages{block.keys.base};
    static_assert(decltype(stages)::bytes <= Block::KeyTile::bytes + Block::ValueTile::bytes);
#pragma unroll
    for (int i = 0; i < Block::kRowTiles; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int slice = 0; slice < Dv / 32; ++slice) {
          const float f = factor(i, h, slice);
#pragma unroll
          for (int j = slice * 4; j < slice * 4 + 4; ++j) {
            const float(&x)[4] = block.o[i][j];
            const uint32_t to = stages.at(stage + lane / 4 + h * 8, j) + lane % 4 * 4;
            ptx::st_shared(to, pack<T>(weighed(x[2 * h], f), weighed(x[2 * h + 1], f)));
          }
        }
      }
      __syncwarp();
#pragma unroll 1
      for (int c = lane; c < 16 * (Dv / 8); c += 32) {
        T* to = out(Block::first_row() + i * 16 + c / (Dv / 8));
        if (to) {
          *reinterpret_cast<Chunk*>(to + c % (Dv / 8) * 8) =
              load_chunk(stages.at(stage + c / (Dv / 8), c % (Dv / 8)));
        }
      }
      __syncwarp();
    }
  }
};

}  // namespace infini
