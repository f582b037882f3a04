// c = a b on tensor cores through a ring of cp.async stages: ldmatrix from swizzled shared memory,
// mma.sync m16n8k16, f32 accumulators, f32 output. a [m][k] row-major.
//   matmul_pipelined_{bf16,f16}      b [k][n], read with ldmatrix.trans
//   matmul_pipelined_{bf16,f16}_nt   b [n][k], read with plain ldmatrix
// k must be a multiple of 8, n of 8 (of 2 for _nt); rows and columns outside are zero-filled.
// Tile 64 x 64 x 64, 4 warps in 2 x 2, each 32 x 32.
// Launch: block 128, grid (ceil(n / 64), ceil(m / 64)), dynamic shared memory 3 * 16384 bytes.
#include "ptx.cuh"

namespace {

constexpr int kTile = 64, kStages = 3, kThreads = 128;
constexpr int kTileBytes = kTile * kTile * 2;
constexpr int kStageBytes = 2 * kTileBytes;

// A 64 x 64 tile of a row-major matrix into swizzled rows of 128 bytes; outside is zero.
template <class T>
__device__ __forceinline__ void load_tile(uint32_t to, const T* from, int row, int col, int rows,
                                          int cols) {
  for (int i = threadIdx.x; i < kTile * 8; i += kThreads) {
    const int r = i / 8, chunk = i % 8;
    const bool inside = row + r < rows && col + chunk * 8 < cols;
    const T* source = inside ? from + int64_t{row + r} * cols + col + chunk * 8 : from;
    ptx::cp_async_16(to + ptx::swizzle_128(r, chunk), source, inside);
  }
}

template <class T, bool RowsOfB>  // RowsOfB: b is [k][n]
__device__ __forceinline__ void matmul(const T* a, const T* b, float* c, int m, int n, int k) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const uint32_t base = ptx::shared_address(memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row0 = blockIdx.y * kTile, col0 = blockIdx.x * kTile;
  const int warp_row = warp / 2 * 32, warp_col = warp % 2 * 32;
  const int steps = (k + kTile - 1) / kTile;

  // Every step commits a group, empty ones included: the wait below counts groups.
  auto load = [&](int step) {
    if (step < steps) {
      const uint32_t stage = base + step % kStages * kStageBytes;
      load_tile(stage, a, row0, step * kTile, m, k);
      if (RowsOfB) {
        load_tile(stage + kTileBytes, b, step * kTile, col0, k, n);
      } else {
        load_tile(stage + kTileBytes, b, col0, step * kTile, n, k);
      }
    }
    ptx::cp_async_commit_group();
  };

  float acc[2][4][4] = {};
  for (int step = 0; step < kStages - 1; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait_group<kStages - 2>();
    // Stage `step` is visible to all, and all have finished reading the stage overwritten next.
    __syncthreads();
    load(step + kStages - 1);
    const uint32_t tile_a = base + step % kStages * kStageBytes, tile_b = tile_a + kTileBytes;
#pragma unroll
    for (int kk = 0; kk < kTile / 16; ++kk) {
      uint32_t fa[2][4], fb[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = warp_row + i * 16 + lane % 16;
        ptx::ldmatrix_x4(fa[i], tile_a + ptx::swizzle_128(row, kk * 2 + lane / 16));
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int col = warp_col + j * 16;
        if (RowsOfB) {
          const int row = kk * 16 + lane % 16;
          ptx::ldmatrix_x4_trans(fb[j], tile_b + ptx::swizzle_128(row, col / 8 + lane / 16));
        } else {
          const int row = col + lane % 8 + lane / 16 * 8;
          ptx::ldmatrix_x4(fb[j], tile_b + ptx::swizzle_128(row, kk * 2 + lane / 8 % 2));
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          ptx::mma_m16n8k16<T>(acc[i][j], fa[i], fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }

#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int col = col0 + warp_col + j * 8 + lane % 4 * 2;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row0 + warp_row + i * 16 + half * 8 + lane / 4;
        if (row < m && col < n) {
          *reinterpret_cast<float2*>(c + int64_t{row} * n + col) =
              make_float2(acc[i][j][2 * half], acc[i][j][2 * half + 1]);
        }
      }
    }
  }
}

}  // namespace

#define MATMUL(name, type, rows_of_b)                                                            \
  extern "C" __global__ void __launch_bounds__(kThreads)                                         \
      name(const type* __restrict__ a, const type* __restrict__ b, float* __restrict__ c, int m, \
           int n, int k) {                                                                       \
    matmul<type, rows_of_b>(a, b, c, m, n, k);                                                   \
  }

MATMUL(matmul_pipelined_bf16, __nv_bfloat16, true)
MATMUL(matmul_pipelined_f16, __half, true)
MATMUL(matmul_pipelined_bf16_nt, __nv_bfloat16, false)
MATMUL(matmul_pipelined_f16_nt, __half, false)
