// The backward pass of CUTLASS' attention for Hopper (its example 88): three kernels, of which the
// main one has a producer warp, two consumer warpgroups and a warp that adds up dq in global memory.
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
using Tile = cute::Shape<cute::_64, cute::_128, cute::_128>;

/// Everything [heads][tokens][128]; lse [heads][tokens].
template <class Fusion>
void differentiate(int heads, int tokens) {
    using Operation = cutlass::fmha::device::FmhaBwd<Element, float, Tile, Fusion>;
    constexpr int D = 128;
    size_t count = size_t(heads) * tokens * D;
    auto shape = cute::make_shape(1, heads, tokens, D);
    auto stride = cute::make_stride(heads * tokens * D, tokens * D, D, cute::_1{});
    auto rows = cute::make_stride(heads * tokens, tokens, cute::_1{});
    auto q = load<Element>("q", count), k = load<Element>("k", count);
    auto v = load<Element>("v", count), o = load<Element>("o", count);
    auto lse = load<float>("lse", size_t(heads) * tokens);
    auto d_o = load<Element>("do", count);
    auto d_q = allocate<Element>(count), d_k = allocate<Element>(count);
    auto d_v = allocate<Element>(count);
    typename Operation::Arguments arguments{
        {1, heads, tokens, tokens, D}, q,   stride, k,   stride, v,   stride, o,       stride, lse,
        rows,                          d_o, stride, d_q, stride, d_k, stride, d_v,     stride, {0, 132}};
    auto succeeds = [](cutlass::Status status, const char* what) {
        require(status == cutlass::Status::kSuccess, what);
    };
    Operation operation;
    succeeds(operation.can_implement(arguments), "can_implement");
    auto workspace = allocate<char>(Operation::get_workspace_size(arguments));
    succeeds(operation.initialize(arguments, workspace), "initialize");
    succeeds(operation.run(), "run");
    save("dq", d_q, count);
    save("dk", d_k, count);
    save("dv", d_v, count);
}

/// Arguments: heads, tokens.
int main(int argc, char** argv) {
    differentiate<cutlass::fmha::collective::CausalFusion>(argument(argc, argv, 1),
                                                           argument(argc, argv, 2));
}
