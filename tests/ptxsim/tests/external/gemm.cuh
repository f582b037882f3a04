// D = A B / 2 - C of CUTLASS, through its collective builders and its device adapter: A [m][k] and
// B [n][k] bf16, C and D [m][n] f32, tiles of 64 or 128 x 128 x 64, clusters of 2 x 1.
#pragma once

#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/util/packed_stride.hpp"
#include "host.h"

/// Few, so that a block has more than one tile, or a tile more than one block.
constexpr int kMultiprocessors = 4;

template <class Tile, class Mainloop, class Epilogue, class Scheduler>
struct Product {
  using Element = cutlass::bfloat16_t;
  using Row = cutlass::layout::RowMajor;
  using Column = cutlass::layout::ColumnMajor;
  using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
  using Stored = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, float, Row, 4, float, Row, 4,
      Epilogue>::CollectiveOp;
  using Stages = cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
      sizeof(typename Stored::SharedStorage))>;
  using Multiplied = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, Row, 8, Element, Column, 8,
      float, Tile, Cluster, Stages, Mainloop>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Multiplied,
                                                      Stored, Scheduler>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  using Schedule = typename Kernel::TileSchedulerArguments;

  /// Arguments m n k; reads the files a, b and c, writes d.
  static void run(int argc, char** argv, Schedule schedule) {
    auto [m, n, k] =
        cute::make_tuple(argument(argc, argv, 1), argument(argc, argv, 2), argument(argc, argv, 3));
    auto a = load<Element>("a", size_t(m) * k), b = load<Element>("b", size_t(n) * k);
    auto c = load<float>("c", size_t(m) * n), d = allocate<float>(size_t(m) * n);
    auto packed = [](auto stride, int rows, int columns) {
      return cutlass::make_cute_packed_stride(stride, cute::make_shape(rows, columns, 1));
    };
    typename Gemm::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {m, n, k, 1},
        {a, packed(typename Kernel::StrideA{}, m, k), b, packed(typename Kernel::StrideB{}, n, k)},
        {{0.5f, -1.0f},
         c,
         packed(typename Kernel::StrideC{}, m, n),
         d,
         packed(typename Kernel::StrideD{}, m, n)},
        {0, kMultiprocessors},
        schedule};
    Gemm gemm;
    require_success(gemm.can_implement(arguments), "can_implement");
    auto workspace = allocate<char>(Gemm::get_workspace_size(arguments) + 1);
    require_success(gemm.initialize(arguments, workspace), "initialize");
    require_success(gemm.run(), "run");
    save("d", d, size_t(m) * n);
  }
};
