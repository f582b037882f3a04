// The backward pass of CUTLASS' attention for Hopper (its example 88): three kernels, of which the
// main one has a producer warp, two consumer warpgroups and a warp that adds up dq in global
// memory.
#include "cute/tensor.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"

#ifdef CORRECTED
// It releases the tile of q while the product for dk may still read it, and a tile of dq while its
// store may: each wait leaves one operation too many. Here all are waited for.
namespace cute {
template <int>
CUTE_DEVICE void wait_for_products() {
  warpgroup_wait<0>();
}
template <int>
CUTE_DEVICE void wait_for_stores() {
  tma_store_wait<0>();
}
}  // namespace cute
#define warpgroup_wait wait_for_products
#define tma_store_wait wait_for_stores
#endif

#include "device/fmha_device_bwd.hpp"
#include "host.h"

using Element = cutlass::half_t;
using Operation =
    cutlass::fmha::device::FmhaBwd<Element, float, cute::Shape<cute::_64, cute::_128, cute::_128>,
                                   cutlass::fmha::collective::CausalFusion>;
constexpr int kDim = 128;

/// Arguments: heads, tokens; reads the files q, k, v, o, do, all [heads][tokens][128], and lse
/// [heads][tokens], writes dq, dk, dv.
int main(int argc, char** argv) {
  int heads = argument(argc, argv, 1), tokens = argument(argc, argv, 2);
  size_t rows = size_t(heads) * tokens, count = rows * kDim;
  Operation::Arguments arguments{};
  arguments.problem_size = {1, heads, tokens, tokens, kDim};
  arguments.ptr_Q = load<Element>("q", count);
  arguments.ptr_K = load<Element>("k", count);
  arguments.ptr_V = load<Element>("v", count);
  arguments.ptr_O = load<Element>("o", count);
  arguments.ptr_dO = load<Element>("do", count);
  arguments.ptr_LSE = load<float>("lse", rows);
  arguments.ptr_dQ = allocate<Element>(count);
  arguments.ptr_dK = allocate<Element>(count);
  arguments.ptr_dV = allocate<Element>(count);
  auto stride = cute::make_stride(heads * tokens * kDim, tokens * kDim, kDim, cute::_1{});
  arguments.stride_Q = arguments.stride_K = arguments.stride_V = arguments.stride_O = stride;
  arguments.stride_dQ = arguments.stride_dK = arguments.stride_dV = arguments.stride_dO = stride;
  arguments.stride_LSE = cute::make_stride(heads * tokens, tokens, cute::_1{});

  Operation operation;
  require_success(operation.can_implement(arguments), "can_implement");
  auto workspace = allocate<char>(Operation::get_workspace_size(arguments));
  require_success(operation.initialize(arguments, workspace), "initialize");
  require_success(operation.run(), "run");
  save("dq", arguments.ptr_dQ, count);
  save("dk", arguments.ptr_dK, count);
  save("dv", arguments.ptr_dV, count);
}
