// Attention of one sequence with FlashInfer's kernel for Hopper: q [tokens][heads][128], k and v
// [keys][heads of keys][128], f16; a producer warp, two consumer warpgroups that take turns.

// Not cutlass_utils.cuh, which brings reference kernels that need cuRAND.
#define FLASHINFER_CUTLASS_UTILS_CUH_
#include <cutlass/gemm/collective/collective_builder.hpp>

#ifdef CORRECTED
// After its stores to shared memory every warp arrives at a barrier of all and, at the same barrier,
// waits: half of the warps, each counted twice, complete a round before the others have stored. Here
// they wait both times.
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
constexpr int D = 128;

template <flashinfer::MaskMode MASK>
cudaError_t attend(Params& params) {
    return flashinfer::SinglePrefillWithKVCacheDispatched<D, D, MASK, false,
                                                          flashinfer::StandardAttention>(params,
                                                                                         nullptr);
}

/// Arguments: tokens, keys, heads, heads of keys, causal; reads the files q, k and v, writes o and
/// lse [heads][tokens], to base 2.
int main(int argc, char** argv) {
    Params params{};
    params.qo_len = argument(argc, argv, 1);
    params.kv_len = argument(argc, argv, 2);
    params.num_qo_heads = argument(argc, argv, 3);
    params.num_kv_heads = argument(argc, argv, 4);
    params.causal = argument(argc, argv, 5);
    params.group_size = params.num_qo_heads / params.num_kv_heads;
    params.window_left = -1;
    params.additional_params.sm_scale = 1 / sqrtf(D);
    params.q_stride_n = params.o_stride_n = params.num_qo_heads * D;
    params.k_stride_n = params.v_stride_n = params.num_kv_heads * D;
    params.q_stride_h = params.o_stride_h = params.k_stride_h = params.v_stride_h = D;

    size_t queries = size_t(params.qo_len) * params.num_qo_heads;
    size_t keys = size_t(params.kv_len) * params.num_kv_heads;
    params.q_ptr = load<Element>("q", queries * D);
    params.k_ptr = load<Element>("k", keys * D);
    params.v_ptr = load<Element>("v", keys * D);
    params.o_ptr = allocate<Element>(queries * D);
    params.lse_ptr = allocate<float>(queries);
    check(params.causal ? attend<flashinfer::MaskMode::kCausal>(params)
                        : attend<flashinfer::MaskMode::kNone>(params),
          "the launch");
    save("o", params.o_ptr, queries * D);
    save("lse", params.lse_ptr, queries);
}
