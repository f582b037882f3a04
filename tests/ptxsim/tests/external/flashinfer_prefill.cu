// Attention of one sequence with FlashInfer's kernel for Hopper: q, k, v [tokens][heads][128], f16;
// a producer warp, two consumer warpgroups that take turns.

// Not cutlass_utils.cuh, which brings reference kernels that need cuRAND.
#define FLASHINFER_CUTLASS_UTILS_CUH_
#include <cutlass/gemm/collective/collective_builder.hpp>

#ifdef CORRECTED
// After its stores to shared memory every warp arrives at a barrier of all and, at the same
// barrier, waits: half of the warps, each counted twice, complete a round before the others have
// stored. Here they wait both times.
#include <flashinfer/attention/hopper/named_barrier.cuh>
#include <flashinfer/attention/hopper/utils.cuh>
#define arrive sync
#include <flashinfer/attention/hopper/epilogue.cuh>
#undef arrive
#endif

#include <flashinfer/attention/hopper/default_params.cuh>
#include <flashinfer/attention/hopper/prefill_sm90.cuh>
#include <flashinfer/attention/hopper/variants.cuh>

#include "host.h"

using Element = cutlass::half_t;
using Params = flashinfer::SinglePrefillParams<Element, Element, Element>;
constexpr int kDim = 128;

template <flashinfer::MaskMode Mask>
cudaError_t attend(Params& params) {
  return flashinfer::SinglePrefillWithKVCacheDispatched<kDim, kDim, Mask, false,
                                                        flashinfer::StandardAttention>(params,
                                                                                       nullptr);
}

/// Arguments: tokens, heads, causal; reads the files q, k and v, writes o and, to base 2, lse
/// [tokens][heads].
int main(int argc, char** argv) {
  int tokens = argument(argc, argv, 1), heads = argument(argc, argv, 2);
  bool causal = argument(argc, argv, 3);
  size_t rows = size_t(tokens) * heads, count = rows * kDim;
  Params params{};
  params.q_ptr = load<Element>("q", count);
  params.k_ptr = load<Element>("k", count);
  params.v_ptr = load<Element>("v", count);
  params.o_ptr = allocate<Element>(count);
  params.lse_ptr = allocate<float>(rows);
  params.additional_params.sm_scale = 1 / sqrtf(kDim);
  params.q_stride_n = params.k_stride_n = params.v_stride_n = params.o_stride_n = heads * kDim;
  params.q_stride_h = params.k_stride_h = params.v_stride_h = params.o_stride_h = kDim;
  params.qo_len = params.kv_len = tokens;
  params.num_qo_heads = params.num_kv_heads = heads;
  params.group_size = 1;
  params.window_left = -1;
  params.causal = causal;
  check(causal ? attend<flashinfer::MaskMode::kCausal>(params)
               : attend<flashinfer::MaskMode::kNone>(params),
        "the launch");
  save("o", params.o_ptr, count);
  save("lse", params.lse_ptr, rows);
}
