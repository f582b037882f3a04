// Local attention and retrieval of 16 query rows by one warp, over its share of the keys of a tile:
// 16 keys (or channels of M) at a time. Shares add up by their log-sum-exp.
#pragma once

#include "common/feature_map.cuh"
#include "common/tile.cuh"

namespace infini {

// Weight of what was summed relative to `own` in what is relative to `top` >= own; -inf: nothing
// was summed, but for NaN, which stays.
__device__ __forceinline__ float share_weight(float own, float top) {
  return own == top ? 1.0f : ptx::ex2_approx_ftz(own - top);
}

template <class T, int Dk, int Dv>
struct KeyShare {
  static constexpr int kKeys = 16;
  using Queries = Tile<T, 16, Dk>;
  using Keys = Tile<T, kKeys, Dk>;
  using Values = Tile<T, kKeys, Dv>;
  using Scores = float[2][4];

  // Row half h of a thread is row lane / 4 + 8 h.
  float o[Dv / 8][4] = {};
  float top[2] = {-INFINITY, -INFINITY};  // running maximum of scores, times scale_log2
  float total[2] = {};  // running sum of exponentials; of this thread's columns until reduce()

  static __device__ __forceinline__ int row(int h) {
    return static_cast<int>(threadIdx.x) % 32 / 4 + h * 8;
  }

  // `visible(h)`: how many of these keys a row sees; asked if `masked`.
  template <class Visible>
  __device__ __forceinline__ void attend(const InfiniProblem& p, const Queries& queries,
                                         const Keys& keys, const Values& values, bool masked,
                                         Visible visible) {
    Scores s = {};
#pragma unroll
    for (int kk = 0; kk < Dk; kk += 16) {
      uint32_t a[4], b[4];
      queries.a(a, 0, kk);
      keys.b(b, 0, kk);
      ptx::mma_m16n8k16<T>(s[0], a, b[0], b[1]);
      ptx::mma_m16n8k16<T>(s[1], a, b[2], b[3]);
    }
    if (p.negative) {
#pragma unroll
      for (auto& tile : s) {
#pragma unroll
        for (float& x : tile) x = -x;
      }
    }
    if (masked) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int end = visible(h) - static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          float& x = s[c / 2][2 * h + c % 2];
          if (c / 2 * 8 + c % 2 >= end) x = -INFINITY;
        }
      }
    }
    weigh(s, p.scale_log2);
    const uint32_t a[4] = {pack<T>(s[0][0], s[0][1]), pack<T>(s[0][2], s[0][3]),
                           pack<T>(s[1][0], s[1][1]), pack<T>(s[1][2], s[1][3])};
    add(a, values);
  }

  // o += (16 channels of sigma(Q) from `channel` on) (their rows of M).
  template <class MappedQueries>
  __device__ __forceinline__ void retrieve(const MappedQueries& queries, int channel,
                                           const Values& memory) {
    uint32_t a[4];
    queries.a(a, 0, channel);
    add(a, memory);
  }

  // Sums of exponentials over a row's four lanes.
  __device__ __forceinline__ void reduce() {
#pragma unroll
    for (float& x : total) x = lanes_sum<4>(x);
  }

 private:
  // Scores become weights relative to the new maximum; what was summed before is rescaled.
  __device__ __forceinline__ void weigh(Scores& s, float scale) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float best = fmaxf(fmaxf(s[0][2 * h], s[0][2 * h + 1]), fmaxf(s[1][2 * h], s[1][2 * h + 1]));
      best = fmaxf(top[h], lanes_max<4>(best) * scale);
      // Nothing visible yet: any finite shift gives weights 0 instead of NaN.
      const float shift = best == -INFINITY ? 0.0f : best;
      const float shrink = ptx::ex2_approx_ftz(top[h] - shift);
      float sum = 0.0f;
#pragma unroll
      for (auto& tile : s) {
#pragma unroll
        for (int c = 2 * h; c < 2 * h + 2; ++c) {
          tile[c] = ptx::ex2_approx_ftz(fmaf(tile[c], scale, -shift));
          sum += tile[c];
        }
      }
      total[h] = total[h] * shrink + sum;
      top[h] = best;
      if (__any_sync(0xffffffff, shrink != 1.0f)) {
#pragma unroll
        for (auto& tile : o) {
          tile[2 * h] *= shrink;
          tile[2 * h + 1] *= shrink;
        }
      }
    }
  }

  // o += a (16 rows of `values`).
  __device__ __forceinline__ void add(const uint32_t (&a)[4], const Values& values) {
#pragma unroll
    for (int j = 0; j < Dv / 16; ++j) {
      uint32_t b[4];
      values.b_trans(b, 0, j * 16);
      ptx::mma_m16n8k16<T>(o[2 * j], a, b[0], b[1]);
      ptx::mma_m16n8k16<T>(o[2 * j + 1], a, b[2], b[3]);
    }
  }
};

}  // namespace infini
