// The running softmax of a consumer warpgroup, over blocks of `Keys` keys: scores and weights in
// the layout of wgmma's accumulators and A fragments.
#pragma once

#include "common/feature_map.cuh"
#include "common/gate.cuh"

namespace infini {

// Row h of a thread is row AttentionGroup::row(h) of the group.
template <class T, int Keys>
struct GroupSoftmax {
  using Scores = float[Keys / 2];
  using Weights = uint32_t[Keys / 16][4];  // A fragments

  float top[2];    // running maximum of scores, times scale_log2
  float total[2];  // running sum of exponentials; of this thread's columns until reduce()

  __device__ __forceinline__ void start() {
    top[0] = top[1] = -INFINITY;
    total[0] = total[1] = 0.0f;
  }

  // Scores become weights relative to the new maximum; `shrink`: what was summed before is to be
  // multiplied by. `visible(h)`: how many of these keys a row sees, if `kMasked`.
  template <bool kMasked, class Visible>
  __device__ __forceinline__ void weigh(const InfiniProblem& p, Scores& s, Visible visible,
                                        float (&shrink)[2]) {
    const int column = static_cast<int>(threadIdx.x) % 4 * 2;
    if (p.negative) {
#pragma unroll
      for (float& x : s) x = -x;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int end = visible(h) - column;
      float best = -INFINITY;
#pragma unroll
      for (int j = 0; j < Keys / 8; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& x = s[4 * j + 2 * h + c];
          if (kMasked && j * 8 + c >= end) x = -INFINITY;
          best = fmaxf(best, x);
        }
      }
      best = fmaxf(top[h], lanes_max<4>(best) * p.scale_log2);
      // A maximum that grew by little stays, and O needs no rescaling: weights up to 2^8 are as
      // exact.
      if (best - top[h] <= 8.0f) best = top[h];
      // Nothing visible yet: any finite shift gives weights 0 instead of NaN.
      const float shift = best == -INFINITY ? 0.0f : best;
      shrink[h] = ptx::ex2_approx_ftz(top[h] - shift);
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < Keys / 8; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& x = s[4 * j + 2 * h + c];
          x = ptx::ex2_approx_ftz(fmaf(x, p.scale_log2, -shift));
          sum += x;
        }
      }
      total[h] = total[h] * shrink[h] + sum;
      top[h] = best;
    }
  }

  // Most blocks raise no row's maximum.
  static __device__ __forceinline__ bool shrinks(const float (&shrink)[2]) {
    return __any_sync(0xffffffff, shrink[0] != 1.0f || shrink[1] != 1.0f);
  }

  static __device__ __forceinline__ void round(const Scores& s, Weights& p) {
#pragma unroll
    for (int i = 0; i < Keys / 4; ++i) p[i / 4][i % 4] = pack<T>(s[2 * i], s[2 * i + 1]);
  }

  // The assembler would move the wait for the products up, before the softmax that is to overlap
  // with them; it does not move it over a branch that depends on the softmax. (This one is never
  // taken: sums of exponentials are not negative.)
  __device__ __forceinline__ void stay_before_wait() const {
    if (total[0] + total[1] < 0.0f) __trap();
  }

  // Sums of exponentials over a row's four lanes.
  __device__ __forceinline__ void reduce() {
#pragma unroll
    for (float& x : total) x = lanes_sum<4>(x);
  }
};

}  // namespace infini
