// Two consumer warpgroups that take turns at the tensor cores and at the epilogue.
#include "gemm.cuh"

using PingPong = Product<cute::Shape<cute::_64, cute::_128, cute::_64>,
                         cutlass::gemm::KernelTmaWarpSpecializedPingpong,
                         cutlass::epilogue::TmaWarpSpecialized, cutlass::gemm::PersistentScheduler>;

int main(int argc, char** argv) { PingPong::run(argc, argv, {}); }
