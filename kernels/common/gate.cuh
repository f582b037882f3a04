// The gate: how the local branch and the retrieval share an output.
#pragma once

#include "common/element.cuh"
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

}  // namespace infini
