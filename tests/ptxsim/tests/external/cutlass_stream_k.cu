// Two consumer warpgroups that share a tile; blocks share tiles along k and add their parts in
// turn.
#include "gemm.cuh"

using Cooperative =
    Product<cute::Shape<cute::_128, cute::_128, cute::_64>,
            cutlass::gemm::KernelTmaWarpSpecializedCooperative,
            cutlass::epilogue::TmaWarpSpecializedCooperative, cutlass::gemm::StreamKScheduler>;

int main(int argc, char** argv) {
  Cooperative::Schedule schedule;
  schedule.decomposition_mode = decltype(schedule.decomposition_mode)::StreamK;
  Cooperative::run(argc, argv, schedule);
}
