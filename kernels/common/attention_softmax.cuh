// The running softmax of the portable attention kernels, over blocks of `Keys` keys: a warp's rows
// in `RowTiles` tiles of 16, in the layout of accumulators.
#pragma once

#include <cfloat>

#include "common/feature_map.cuh"
#include "common/gate.cuh"

namespace infini {

// Row i, half h of a thread is its row in half h of row tile i.
template <class T, int RowTiles, int Keys>
struct Softmax {
  using Scores = float[RowTiles][Keys / 8][4];
  using Weights = uint32_t[RowTiles][4];  // A fragments of 16 columns

  float top[RowTiles][2];  // running maximum of scores, times scale_log2
  // Running sum of exponentials; of this thread's columns until reduce().
  float total[RowTiles][2];

  __device__ __forceinline__ Softmax() {
#pragma unroll
    for (int i = 0; i < RowTiles; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        top[i][h] = -FLT_MAX;
        total[i][h] = 0.0f;
      }
    }
  }

  // Columns of this thread from `visible(i, h)` on become -inf.
  template <class Visible>
  static __device__ __forceinline__ void mask(Scores& s, Visible visible) {
#pragma unroll
    for (int i = 0; i < RowTiles; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int end = visible(i, h);
#pragma unroll
        for (int j = 0; j < Keys / 8; ++j) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            if (j * 8 + c >= end) s[i][j][2 * h + c] = -INFINITY;
          }
        }
      }
    }
  }

  // Raises the running maxima to those of the scores. Where one of the warp's grew, what was summed
  // before is rescaled: outputs by `rescale(i, h, factor)`.
  template <class Rescale>
  __device__ __forceinline__ void raise(const Scores& s, float scale, Rescale rescale) {
    float best[RowTiles][2];
    bool grown = false;
#pragma unroll
    for (int i = 0; i < RowTiles; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float x = -INFINITY;
#pragma unroll
        for (int j = 0; j < Keys / 8; ++j) {
          x = fmaxf(x, fmaxf(s[i][j][2 * h], s[i][j][2 * h + 1]));
        }
        best[i][h] = lanes_max<4>(x) * scale;
        grown |= best[i][h] > top[i][h];
      }
    }
    if (!__any_sync(0xffffffff, grown)) return;
#pragma unroll
    for (int i = 0; i < RowTiles; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        best[i][h] = fmaxf(best[i][h], top[i][h]);
        const float shrink = ptx::ex2_approx_ftz(top[i][h] - best[i][h]);
        top[i][h] = best[i][h];
        total[i][h] *= shrink;
        rescale(i, h, shrink);
      }
    }
  }

  // Weights of 16 keys.
  __device__ __forceinline__ void weigh(Weights& a, const Scores& s, int key, float scale) {
#pragma unroll
    for (int i = 0; i < RowTiles; ++i) {
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

  // Sums of exponentials over a row's four lanes.
  __device__ __forceinline__ void reduce() {
#pragma unroll
    for (int i = 0; i < RowTiles; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) total[i][h] = lanes_sum<4>(total[i][h]);
    }
  }
};

}  // namespace infini
