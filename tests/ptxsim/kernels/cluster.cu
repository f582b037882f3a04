// Clusters of any size up to 8, sm_90 (the size is a launch attribute, along x).
//   cluster_sum        every block sums its 128 inputs and reads the sums of its peers through
//                      distributed shared memory: out[block] = the sum over its cluster.
//                      Launch: block 128, grid a multiple of the cluster; in [grid * 128].
//   cluster_push       the same sum, the other way round: each block stores its sum into block 0 of
//                      the cluster and arrives at an mbarrier there. out [clusters].
//   cluster_multicast  block r of a cluster of c loads rows 16 r / c to 16 (r + 1) / c of a 16 x 64
//   f32
//                      tile into all blocks; out [grid][16][64] = tile + number of the block in the
//                      grid. in [clusters * 16][64]; map: f32, box {64, 16 / c}, no swizzle.
//                      Launch: block 128.
#include "ptx.cuh"

namespace {

__device__ __forceinline__ float block_sum(float x, float (&parts)[4]) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffff, x, step);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  return parts[0] + parts[1] + parts[2] + parts[3];
}

}  // namespace

extern "C" __global__ void __launch_bounds__(128) cluster_sum(const float* in, float* out) {
  __shared__ float parts[4], sum;
  const float mine = block_sum(in[blockIdx.x * 128 + threadIdx.x], parts);
  if (threadIdx.x == 0) sum = mine;
  ptx::barrier_cluster_arrive();
  ptx::barrier_cluster_wait();
  if (threadIdx.x == 0) {
    float all = 0.0f;
    for (uint32_t r = 0; r < ptx::cluster_nctarank(); ++r) {
      all += ptx::ld_shared_cluster(ptx::mapa(ptx::shared_address(&sum), r));
    }
    out[blockIdx.x] = all;
  }
  // A block's shared memory must outlive the reads of its peers.
  ptx::barrier_cluster_arrive();
  ptx::barrier_cluster_wait();
}

// What a block wrote before it arrives is visible to the one that waits.
__device__ __forceinline__ void arrive_release_cluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier)
               : "memory");
}

__device__ __forceinline__ void wait_acquire_cluster(uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nWAIT:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

extern "C" __global__ void __launch_bounds__(128) cluster_push(const float* in, float* out) {
  __shared__ float parts[4], sums[8];
  __shared__ __align__(8) uint64_t ready;
  const uint32_t rank = ptx::cluster_ctarank(), blocks = ptx::cluster_nctarank();
  const uint32_t barrier = ptx::shared_address(&ready);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, blocks);
    ptx::fence_mbarrier_init();
  }
  ptx::barrier_cluster_arrive();
  ptx::barrier_cluster_wait();
  const float mine = block_sum(in[blockIdx.x * 128 + threadIdx.x], parts);
  if (threadIdx.x == 0) {
    ptx::st_shared_cluster(ptx::mapa(ptx::shared_address(&sums[rank]), 0), mine);
    arrive_release_cluster(ptx::mapa(barrier, 0));
    if (rank == 0) {
      wait_acquire_cluster(barrier, 0);
      float all = 0.0f;
      for (uint32_t r = 0; r < blocks; ++r) all += sums[r];
      out[blockIdx.x / blocks] = all;
    }
  }
}

extern "C" __global__ void __launch_bounds__(128)
    cluster_multicast(const __grid_constant__ ptx::TensorMap in, float* out) {
  __shared__ __align__(128) float tile[16 * 64];
  __shared__ __align__(8) uint64_t full;
  const uint32_t rank = ptx::cluster_ctarank(), blocks = ptx::cluster_nctarank();
  const uint32_t barrier = ptx::shared_address(&full);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(barrier, sizeof(tile));
  }
  // Every block's barrier is ready before any peer's copy can land on it.
  ptx::barrier_cluster_arrive();
  ptx::barrier_cluster_wait();
  if (threadIdx.x == 0) {
    const int rows = 16 / blocks, first = rank * rows;
    const int row = blockIdx.x / blocks * 16 + first;
    ptx::cp_async_bulk_tensor_multicast_2d(ptx::shared_address(tile) + first * 256, &in, 0, row,
                                           barrier, static_cast<uint16_t>((1 << blocks) - 1));
  }
  ptx::mbarrier_wait_parity(barrier, 0);
  for (int i = threadIdx.x; i < 1024; i += 128) {
    out[blockIdx.x * 1024 + i] = tile[i] + blockIdx.x;
  }
  // No block may exit while a peer's copy still uses its barrier or its memory.
  ptx::barrier_cluster_arrive();
  ptx::barrier_cluster_wait();
}
