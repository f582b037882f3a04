// Hopper kernels from templates, as common/instantiate.h does it for the portable ones. The one
// parameter of infini_<operation>_sm90_<dtype>_d<Dk> is `Maps` tensor maps and the operation's
// parameters.
#pragma once

#include "common/instantiate.h"
#include "sm90/ptx.cuh"
#include "sm90/tiles.h"

namespace infini {

template <class Params, int Maps>
struct alignas(128) Mapped {
  ptx::TensorMap maps[Maps];
  Params p;
};

}  // namespace infini

#define INFINI_SM90_JOIN_(operation, dtype, dims) infini_##operation##_sm90_##dtype##_##dims
#define INFINI_SM90_JOIN(operation, dtype, dims) INFINI_SM90_JOIN_(operation, dtype, dims)

#define INFINI_SM90_KERNEL(name, call, Params, count, Launch)                          \
  extern "C" __global__ void __launch_bounds__(Launch::threads, Launch::blocks_per_sm) \
      name(const __grid_constant__ infini::Mapped<Params, count> p) {                  \
    infini::call(p.maps, p.p);                                                         \
  }

#define INFINI_SM90_HEAD_(operation, Params, count, Launch, T, dtype, dk, dv)     \
  INFINI_SM90_KERNEL(INFINI_SM90_JOIN(operation, dtype, INFINI_NAME_##dk##_##dv), \
                     INFINI_COMMAS(operation<infini::T, dk, dv>), Params, count,  \
                     INFINI_COMMAS(infini::Launch<dk, dv>))
#define INFINI_SM90_HEAD(operation, Params, count, Launch, dk, dv)        \
  INFINI_SM90_HEAD_(operation, Params, count, Launch, Bf16, bf16, dk, dv) \
  INFINI_SM90_HEAD_(operation, Params, count, Launch, F16, f16, dk, dv)

#define INFINI_SM90_KEY_(operation, Params, count, Launch, T, dtype, dk) \
  INFINI_SM90_KERNEL(INFINI_SM90_JOIN(operation, dtype, d##dk),          \
                     INFINI_COMMAS(operation<infini::T, dk>), Params, count, infini::Launch<dk>)
#define INFINI_SM90_KEY(operation, Params, count, Launch, dk)        \
  INFINI_SM90_KEY_(operation, Params, count, Launch, Bf16, bf16, dk) \
  INFINI_SM90_KEY_(operation, Params, count, Launch, F16, f16, dk)

// Without tensor maps, and in a launch that may begin early.
#define INFINI_SM90_PLAIN(name, call, Params, threads, blocks_per_sm)  \
  extern "C" __global__ void __launch_bounds__(threads, blocks_per_sm) \
      name(const __grid_constant__ Params p) {                         \
    extern __shared__ __align__(128) unsigned char shared[];           \
    infini::ptx::follow();                                             \
    infini::call(p, shared);                                           \
  }
#define INFINI_SM90_PLAIN_KEY_(operation, Params, Launch, T, dtype, dk)           \
  INFINI_SM90_PLAIN(INFINI_SM90_JOIN(operation, dtype, d##dk),                    \
                    INFINI_COMMAS(operation<infini::T, dk>), Params,              \
                    infini::Launch<dk>::threads, infini::Launch<dk>::blocks_per_sm)
#define INFINI_SM90_PLAIN_KEY(operation, Params, Launch, dk)        \
  INFINI_SM90_PLAIN_KEY_(operation, Params, Launch, Bf16, bf16, dk) \
  INFINI_SM90_PLAIN_KEY_(operation, Params, Launch, F16, f16, dk)
