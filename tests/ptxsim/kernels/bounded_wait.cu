// The wait of the crate's kernels that gives up, sm_90.
//   wait_plain    block `block` waits in its warp `warp` for phase 1 of a barrier of which only
//                 phase 0 completes, all others for phase 0. out [grid]: shared address of the
//                 barrier. Launch: block 96, any grid.
#define INFINI_WAIT_POLLS 40
#include "sm90/ptx.cuh"

namespace ptx = infini::ptx;

extern "C" __global__ void __launch_bounds__(96) wait_plain(uint32_t* out, int block, int warp) {
  __shared__ __align__(8) uint64_t barriers[3];
  const uint32_t barrier = ptx::shared_address(&barriers[2]);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    out[blockIdx.x] = barrier;
  }
  __syncthreads();
  if (threadIdx.x == 0) ptx::mbarrier_arrive(barrier);
  ptx::mbarrier_wait_parity(barrier, 0);
  if (blockIdx.x == block && threadIdx.x / 32 == warp) ptx::mbarrier_wait_parity(barrier, 1);
}
