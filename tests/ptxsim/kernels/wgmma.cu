// One 64 x 64 x 64 product of a warpgroup, f16, f32 output d [64][64], for the operand forms that
// the large kernels do not use. Operands are written to shared memory by ordinary stores.
//   wgmma_registers     a [64 m][64 k] from registers, b [n][k] (K-major)
//   wgmma_registers_t   a [64 m][64 k] from registers, b [k][n] (N-major)
//   wgmma_shared_tt     a [k][m] (M-major) and b [k][n] (N-major) from shared memory
//   wgmma_add           d += a b, in two groups: d starts from its values in memory; a [m][k], b
//   [n][k]
// Launch: block 128, grid 1, dynamic shared memory 16384 bytes.
#include "ptx.cuh"

namespace {

extern __shared__ __align__(1024) unsigned char memory[];

constexpr int kTileBytes = 64 * 128;

// A dense [64][64] matrix into swizzled rows of 128 bytes.
__device__ __forceinline__ void store_tile(unsigned char* to, const __half* from) {
  for (int i = threadIdx.x; i < 64 * 8; i += 128) {
    *reinterpret_cast<uint4*>(to + ptx::swizzle_128(i / 8, i % 8)) =
        reinterpret_cast<const uint4*>(from)[i];
  }
}

// Makes ordinary stores of all threads visible to wgmma.
__device__ __forceinline__ void publish() {
  ptx::fence_proxy_async_shared();
  __syncthreads();
}

// Row and column of accumulator i.
__device__ __forceinline__ int element(int i) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = warp * 16 + lane / 4 + i / 2 % 2 * 8, col = i / 4 * 8 + lane % 4 * 2 + i % 2;
  return row * 64 + col;
}

__device__ __forceinline__ void write(const float (&acc)[32], float* d) {
#pragma unroll
  for (int i = 0; i < 32; ++i) d[element(i)] = acc[i];
}

// 16 columns of a, from column 16 kk, as an A fragment.
__device__ __forceinline__ void load_fragment(uint32_t (&r)[4], const __half* a, int kk) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = warp * 16 + lane / 4 + i % 2 * 8, col = kk * 16 + lane % 4 * 2 + i / 2 * 8;
    r[i] = *reinterpret_cast<const uint32_t*>(a + row * 64 + col);
  }
}

// Descriptor of k-step kk of a tile, stored with k along the rows (K-major) or across them.
template <int Across>
__device__ __forceinline__ uint64_t operand(const unsigned char* tile, int kk) {
  const uint32_t start = ptx::shared_address(tile) + kk * (Across ? 16 * 128 : 32);
  return ptx::descriptor_128(start, Across ? kTileBytes : 16, 1024);
}

template <int TransB>
__device__ __forceinline__ void from_registers(const __half* a, const __half* b, float* d) {
  store_tile(memory, b);
  uint32_t fragments[4][4];
#pragma unroll
  for (int kk = 0; kk < 4; ++kk) load_fragment(fragments[kk], a, kk);
  publish();
  float acc[32];
  ptx::wgmma_fence();
#pragma unroll
  for (int kk = 0; kk < 4; ++kk) {
    ptx::Wgmma<__half, 64>::rs<TransB>(acc, fragments[kk], operand<TransB>(memory, kk), kk > 0);
  }
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>();
  write(acc, d);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(128)
    wgmma_registers(const __half* a, const __half* b, float* d) {
  from_registers<0>(a, b, d);
}

extern "C" __global__ void __launch_bounds__(128)
    wgmma_registers_t(const __half* a, const __half* b, float* d) {
  from_registers<1>(a, b, d);
}

extern "C" __global__ void __launch_bounds__(128)
    wgmma_shared_tt(const __half* a, const __half* b, float* d) {
  store_tile(memory, a);
  store_tile(memory + kTileBytes, b);
  publish();
  float acc[32];
  ptx::wgmma_fence();
#pragma unroll
  for (int kk = 0; kk < 4; ++kk) {
    ptx::Wgmma<__half, 64>::ss<1, 1>(acc, operand<1>(memory, kk),
                                     operand<1>(memory + kTileBytes, kk), kk > 0);
  }
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>();
  write(acc, d);
}

extern "C" __global__ void __launch_bounds__(128)
    wgmma_add(const __half* a, const __half* b, float* d) {
  store_tile(memory, a);
  store_tile(memory + kTileBytes, b);
  float acc[32];
#pragma unroll
  for (int i = 0; i < 32; ++i) acc[i] = d[element(i)];
  publish();
  ptx::wgmma_fence();  // the accumulators were written by ordinary instructions
#pragma unroll
  for (int kk = 0; kk < 4; ++kk) {
    ptx::Wgmma<__half, 64>::ss<0, 0>(acc, operand<0>(memory, kk),
                                     operand<0>(memory + kTileBytes, kk), 1);
    if (kk == 1) ptx::wgmma_commit_group();
  }
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<1>();  // the first two steps; the accumulators are still in flight
  ptx::wgmma_wait_group<0>();
  write(acc, d);
}
