// c = a b with TMA and wgmma: warp 0 fills a ring of shared-memory stages, one warpgroup
// multiplies, and the bf16 result leaves through swizzled shared memory and a TMA store. a [m][k]
// bf16.
//   matmul_wgmma       b [k][n], N-major operand; its map has box {64, 64}
//   matmul_wgmma_nt    b [n][k], K-major operand; its map has box {64, 128}
// Maps: 128-byte swizzle; a box {64, 64} of {k, m}; c box {64, 64} of {n, m}. Out-of-range elements
// are zero on loads and dropped on stores, so any m, n, k the maps allow will do.
//
// Tile 64 x 128 x 64. Shared memory: 3 stages of a (8192 bytes) + b (16384), then c (16384) =
// 90112. full[s]: 1 arrival (producer, with 24576 bytes), waited on by the consumers. empty[s]: 4
// arrivals (one lane per consumer warp), waited on by the producer. Launch: block 256 (warps 0 to 3
// producer, 4 to 7 consumer), grid (ceil(n / 128), ceil(m / 64)).
#include "ptx.cuh"

namespace {

constexpr int kRows = 64, kCols = 128, kDepth = 64, kStages = 3;
constexpr int kBytesA = kRows * kDepth * 2, kBytesB = kCols * kDepth * 2;
constexpr int kStageBytes = kBytesA + kBytesB;
constexpr int kStrip = 64 * 128;  // 64 rows of 128 bytes

template <bool RowsOfB>  // b is [k][n]
__device__ __forceinline__ void produce(const ptx::TensorMap* a, const ptx::TensorMap* b,
                                        uint32_t ring, uint32_t full, uint32_t empty, int steps) {
  const int row = blockIdx.y * kRows, col = blockIdx.x * kCols;
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages;
    const uint32_t to = ring + stage * kStageBytes, barrier = full + stage * 8;
    // The first round passes at once: a fresh barrier counts as completed for parity 1.
    ptx::mbarrier_wait_parity(empty + stage * 8, step / kStages % 2 ^ 1);
    ptx::mbarrier_arrive_expect_tx(barrier, kStageBytes);
    ptx::cp_async_bulk_tensor_load_2d(to, a, step * kDepth, row, barrier);
    if (RowsOfB) {
      ptx::cp_async_bulk_tensor_load_2d(to + kBytesA, b, col, step * kDepth, barrier);
      ptx::cp_async_bulk_tensor_load_2d(to + kBytesA + kStrip, b, col + 64, step * kDepth, barrier);
    } else {
      ptx::cp_async_bulk_tensor_load_2d(to + kBytesA, b, step * kDepth, col, barrier);
    }
  }
}

template <bool RowsOfB>
__device__ __forceinline__ void multiply(float (&d)[64], uint32_t a, uint32_t b, bool first) {
  ptx::wgmma_fence();
#pragma unroll
  for (int kk = 0; kk < kDepth / 16; ++kk) {
    const uint64_t da = ptx::descriptor_128(a + kk * 32, 16, 1024);
    // N-major: a step of 16 along k is 16 rows of 128 bytes; columns 64 to 127 are a second strip.
    const uint64_t db = RowsOfB ? ptx::descriptor_128(b + kk * 2048, kStrip, 1024)
                                : ptx::descriptor_128(b + kk * 32, 16, 1024);
    ptx::Wgmma<__nv_bfloat16, 128>::ss<0, RowsOfB ? 1 : 0>(d, da, db, !(first && kk == 0));
  }
  ptx::wgmma_commit_group();
}

// Accumulators as bf16 into two swizzled strips of 64 columns.
__device__ __forceinline__ void stage_output(const float (&d)[64], uint32_t out) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int row = warp * 16 + lane % 16;
#pragma unroll
  for (int q = 0; q < 8; ++q) {
    uint32_t r[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      r[i] = infini::pack<__nv_bfloat16>(d[8 * q + 2 * i], d[8 * q + 2 * i + 1]);
    const int chunk = q % 4 * 2 + lane / 16;
    ptx::stmatrix_x4(out + q / 4 * kStrip + ptx::swizzle_128(row, chunk), r);
  }
}

template <bool RowsOfB>
__device__ __forceinline__ void consume(const ptx::TensorMap* c, uint32_t ring, uint32_t out,
                                        uint32_t full, uint32_t empty, int steps) {
  float d[64];
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages;
    const uint32_t a = ring + stage * kStageBytes;
    ptx::mbarrier_wait_parity(full + stage * 8, step / kStages % 2);
    multiply<RowsOfB>(d, a, a + kBytesA, step == 0);
    ptx::wgmma_wait_group<0>();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(empty + stage * 8);
  }
  stage_output(d, out);
  // The TMA store reads through the async proxy: every writer fences, then all meet.
  ptx::fence_proxy_async_shared();
  ptx::bar_sync(1, 128);
  if (threadIdx.x == 128) {
    const int row = blockIdx.y * kRows, col = blockIdx.x * kCols;
    ptx::cp_async_bulk_tensor_store_2d(c, col, row, out);
    ptx::cp_async_bulk_tensor_store_2d(c, col + 64, row, out + kStrip);
    ptx::cp_async_bulk_commit_group();
    ptx::cp_async_bulk_wait_group<0>();
  }
}

template <bool RowsOfB>
__device__ __forceinline__ void matmul(const ptx::TensorMap* a, const ptx::TensorMap* b,
                                       const ptx::TensorMap* c, int k) {
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ __align__(8) uint64_t barriers[2 * kStages];
  const uint32_t ring = ptx::shared_address(memory), out = ring + kStages * kStageBytes;
  const uint32_t full = ptx::shared_address(barriers), empty = full + kStages * 8;
  const int steps = (k + kDepth - 1) / kDepth;
  if (threadIdx.x == 0) {
    ptx::prefetch_tensormap(a);
    ptx::prefetch_tensormap(b);
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(full + s * 8, 1);
      ptx::mbarrier_init(empty + s * 8, 4);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    ptx::setmaxnreg_dec<24>();
    if (threadIdx.x < 32 && ptx::elect_sync()) produce<RowsOfB>(a, b, ring, full, empty, steps);
  } else {
    ptx::setmaxnreg_inc<240>();
    consume<RowsOfB>(c, ring, out, full, empty, steps);
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256, 1)
    matmul_wgmma(const __grid_constant__ ptx::TensorMap a, const __grid_constant__ ptx::TensorMap b,
                 const __grid_constant__ ptx::TensorMap c, int k) {
  matmul<true>(&a, &b, &c, k);
}

extern "C" __global__ void __launch_bounds__(256, 1)
    matmul_wgmma_nt(const __grid_constant__ ptx::TensorMap a,
                    const __grid_constant__ ptx::TensorMap b,
                    const __grid_constant__ ptx::TensorMap c, int k) {
  matmul<false>(&a, &b, &c, k);
}
