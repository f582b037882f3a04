// Waits of the crate's kernels that give up, sm_90.
//   wait_plain    block `block` waits in its warp `warp` for phase 1 of a barrier of which only
//                 phase 0 completes, all others for phase 0. out [grid]: shared address of the
//                 barrier. Launch: block 96, any grid.
//   wait_cluster  the same by the wait that acquires from the whole cluster.
#define INFINI_WAIT_POLLS 40
#include "sm90/ptx.cuh"

namespace ptx = infini::ptx;

template <class Wait>
__device__ __forceinline__ void run(uint32_t* out, int block, int warp, Wait wait) {
  __shared__ __align__(8) uint64_t barriers[3];
  const uint32_t barrier = ptx::shared_address(&barriers[2]);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    out[blockIdx.x] = barrier;
  }
  __syncthreads();
  if (threadIdx.x == 0) ptx::mbarrier_arrive(barrier);
  wait(barrier, 0);
  if (blockIdx.x == block && threadIdx.x / 32 == warp) wait(barrier, 1);
}

extern "C" __global__ void __launch_bounds__(96) wait_plain(uint32_t* out, int block, int warp) {
  run(out, block, warp, ptx::mbarrier_wait_parity);
}

extern "C" __global__ void __launch_bounds__(96) wait_cluster(uint32_t* out, int block, int warp) {
  run(out, block, warp, ptx::mbarrier_wait_parity_cluster);
}
