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
  return {__fdividef(1.0f, 1.0f + expf(-logit)), __fdividef(1.0f, 1.0f + expf(logit))};
}

// A branch of weight 0 is absent, whatever it holds.
__device__ __forceinline__ float weighed(float x, float weight) {
  return weight == 0.0f ? 0.0f : x * weight;
}

// `weight` over a sum of exponentials; 0 where nothing was attended.
__device__ __forceinline__ float over_total(float weight, float total) {
  return weight == 0.0f || total == 0.0f ? 0.0f : __fdividef(weight, total);
}

// Natural log-sum-exp of scores whose exponentials, relative to 2^top, sum to `total`; -inf where
// nothing was attended.
__device__ __forceinline__ float log_sum_exp(float top, float total) {
  return total == 0.0f ? -INFINITY : (top + log2f(total)) * kLn2;
}

// Both branches in the registers of one output, O <- f O, O += sigma(Q) snapshot, O <- e O: e of a
// row, where `weight` is its gate over the denominator. f = share / e: e is bounded away from 0 so
// that f stays finite; what that adds is below rounding.
__device__ __forceinline__ float retrieved_share(float weight, float scale, float share) {
  const float e = weight * inverse_scale(scale);
  const float least = share * 1e-30f;
  return fabsf(e) < least ? least : e;
}

}  // namespace infini
