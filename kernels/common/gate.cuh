// The gate: how the local branch and the retrieval share an output.
#pragma once

#include "common/snapshot.cuh"
#include "params.h"

namespace infini {

constexpr float kLn2 = 0.693147181f;

// Weights of the two branches.
struct Gate {
  float memory, local;
};

__device__ __forceinline__ Gate gate_of(const InfiniProblem& p, float logit, bool empty) {
  if (empty && p.bypass) return {0.0f, 1.0f};
  // Where 1 + e^|logit| would leave the numbers whose reciprocal is one.
  const float ratio = expf(-fabsf(logit)), more = __fdividef(1.0f, 1.0f + ratio);
  return logit > 0.0f ? Gate{more, ratio * more} : Gate{ratio * more, more};
}

// A branch of weight 0 is absent, whatever it holds.
__device__ __forceinline__ float weighed(float x, float weight) {
  return weight == 0.0f ? 0.0f : x * weight;
}

// `weight` over a sum of exponentials. A row sees at least its own key: where the sum is 0 all scores
// are -inf, and the infinite weight turns outputs of 0 into NaN.
__device__ __forceinline__ float over_total(float weight, float total) {
  return weight == 0.0f ? 0.0f : __fdividef(weight, total);
}

// Natural log-sum-exp of scores whose exponentials, relative to 2^top, sum to `total`; NaN as above.
__device__ __forceinline__ float log_sum_exp(float top, float total) {
  return total == 0.0f ? NAN : (top + log2f(total)) * kLn2;
}

// Both branches in the registers of one output, O <- f O, O += sigma(Q) snapshot, O <- e O: e of a
// row, where `weight` is its gate over the denominator. f = share / e. Where the memory weighs so
// little that f would take O, whose largest magnitude is `top`, out of f32, e is raised to `least`:
// what that adds is below rounding.
__device__ __forceinline__ float least_share(float share, float top) {
  return share * (0x1p-120f * fmaxf(top, 0x1p-5f));
}

__device__ __forceinline__ float retrieved_share(float weight, float scale, float least) {
  const float e = weight * inverse_scale(scale);
  return fabsf(e) < least ? least : e;
}

}  // namespace infini
