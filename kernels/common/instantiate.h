// Kernels from templates: every element type, every head dimension of tiles.h.
//
//   #define INFINI_INSTANCE(dk, dv) INFINI_HEAD(operation, Params, Launch, dk, dv)
//   INFINI_HEAD_DIMS(INFINI_INSTANCE)
//
// defines infini_<operation>_sm80_<dtype>_d<Dk>[x<Dv>], which calls operation<T, Dk, Dv>(p, shared)
// with p the one parameter and shared the dynamic shared memory. Launch<Dk, Dv> gives threads and
// blocks_per_sm. INFINI_KEY: the same with Dk alone; INFINI_TYPE: with the element type alone.
#pragma once

#include "common/element.cuh"
#include "common/tiles.h"
#include "params.h"

// Equal dimensions are named once.
#define INFINI_NAME_32_32 d32
#define INFINI_NAME_64_64 d64
#define INFINI_NAME_96_96 d96
#define INFINI_NAME_128_128 d128
#define INFINI_NAME_256_256 d256
#define INFINI_NAME_64_128 d64x128
#define INFINI_NAME_128_64 d128x64
#define INFINI_NAME_192_128 d192x128

#define INFINI_KERNEL(name, call, Params, threads, blocks_per_sm)      \
  extern "C" __global__ void __launch_bounds__(threads, blocks_per_sm) \
      name(const __grid_constant__ Params p) {                         \
    extern __shared__ __align__(128) unsigned char shared[];           \
    infini::call(p, shared);                                           \
  }
#define INFINI_COMMAS(...) __VA_ARGS__
#define INFINI_JOIN_(operation, dtype, dims) infini_##operation##_sm80_##dtype##_##dims
#define INFINI_JOIN(operation, dtype, dims) INFINI_JOIN_(operation, dtype, dims)

#define INFINI_HEAD_(operation, Params, Launch, T, dtype, dk, dv)       \
  INFINI_KERNEL(INFINI_JOIN(operation, dtype, INFINI_NAME_##dk##_##dv), \
                INFINI_COMMAS(operation<infini::T, dk, dv>), Params,    \
                INFINI_COMMAS(infini::Launch<dk, dv>::threads),         \
                INFINI_COMMAS(infini::Launch<dk, dv>::blocks_per_sm))
#define INFINI_HEAD(operation, Params, Launch, dk, dv)        \
  INFINI_HEAD_(operation, Params, Launch, Bf16, bf16, dk, dv) \
  INFINI_HEAD_(operation, Params, Launch, F16, f16, dk, dv)

#define INFINI_KEY_(operation, Params, Launch, T, dtype, dk)                                   \
  INFINI_KERNEL(INFINI_JOIN(operation, dtype, d##dk), INFINI_COMMAS(operation<infini::T, dk>), \
                Params, infini::Launch<dk>::threads, infini::Launch<dk>::blocks_per_sm)
#define INFINI_KEY(operation, Params, Launch, dk)        \
  INFINI_KEY_(operation, Params, Launch, Bf16, bf16, dk) \
  INFINI_KEY_(operation, Params, Launch, F16, f16, dk)

#define INFINI_TYPE(operation, Params)                                           \
  INFINI_KERNEL(infini_##operation##_sm80_bf16, operation<infini::Bf16>, Params, \
                infini::kElementThreads, 1)                                      \
  INFINI_KERNEL(infini_##operation##_sm80_f16, operation<infini::F16>, Params,   \
                infini::kElementThreads, 1)
