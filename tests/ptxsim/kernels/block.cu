// Cooperation inside a block and between blocks.
//   ticket_sum   out[0] = Σ in[0..n], one launch: blocks write partial sums, the block that draws
//   the
//                last ticket adds them. partial [grid], ticket [1] starts at 0 and is 0 again
//                after. Launch: block 256, any grid.
//   named_barriers   warps 0, 1 fill one of two buffers, warps 2, 3 empty it, handed over by
//                bar.sync / bar.arrive: out[64 t + i] = 2 in[64 t + 63 - i] + t for every tile t.
//                Launch: block 128, grid 1.
//   transpose_shared   out [cols][rows] = inᵀ through a padded 32 x 33 shared tile.
//                Launch: block (32, 8), grid (ceil(cols / 32), ceil(rows / 32)).
//   transpose_conflicts   the same without padding: 32-way bank conflicts on the reads.
//   histogram    bins [256] += counts of in [n] (bytes), private bins in shared memory first.
//                Launch: block 256, any grid.
//   spin_chain   block b waits until block b - 1 has published, then adds its number: needs all
//                blocks resident. out[b] = b (b + 1) / 2; flags [grid] start at 0.
//                Launch: block 32, any grid.
#include "ptx.cuh"

namespace {

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffff, x, step);
  return x;
}

// The sum over a block of 256 threads, in all threads of warp 0.
__device__ __forceinline__ float block_sum(float x, float (&parts)[8]) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  return warp_sum(threadIdx.x < 8 ? parts[threadIdx.x] : 0.0f);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256)
    ticket_sum(const float* in, int n, float* partial, unsigned* ticket, float* out) {
  __shared__ float parts[8];
  __shared__ bool last;
  float mine = 0.0f;
  for (int i = blockIdx.x * 256 + threadIdx.x; i < n; i += gridDim.x * 256) mine += in[i];
  const float sum = block_sum(mine, parts);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sum;
    __threadfence();  // the partial sum before the ticket
    last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
    __threadfence();  // the ticket before the partial sums of others
  }
  __syncthreads();
  if (!last) return;
  float all = 0.0f;
  for (int i = threadIdx.x; i < gridDim.x; i += 256) all += partial[i];
  all = block_sum(all, parts);
  if (threadIdx.x == 0) out[0] = all;
}

extern "C" __global__ void __launch_bounds__(128)
    named_barriers(const float* in, float* out, int tiles) {
  __shared__ float buffer[2][64];
  constexpr int kFilled = 1, kEmptied = 3;  // and the next number, for the second buffer
  const int i = threadIdx.x % 64;
  if (threadIdx.x < 64) {
    for (int t = 0; t < tiles; ++t) {
      if (t >= 2) ptx::bar_sync(kEmptied + t % 2, 128);
      buffer[t % 2][i] = 2.0f * in[t * 64 + i];
      ptx::bar_arrive(kFilled + t % 2, 128);
    }
  } else {
    for (int t = 0; t < tiles; ++t) {
      ptx::bar_sync(kFilled + t % 2, 128);
      out[t * 64 + i] = buffer[t % 2][63 - i] + t;
      // Nobody waits for the last two tiles to be emptied.
      if (t + 2 < tiles) ptx::bar_arrive(kEmptied + t % 2, 128);
    }
  }
}

namespace {

template <int Pitch>
__device__ __forceinline__ void transpose(const float* in, float* out, int rows, int cols) {
  __shared__ float tile[32][Pitch];
  const int row0 = blockIdx.y * 32, col0 = blockIdx.x * 32;
  for (int y = threadIdx.y; y < 32; y += 8) {
    const int row = row0 + y, col = col0 + threadIdx.x;
    if (row < rows && col < cols) tile[y][threadIdx.x] = in[row * cols + col];
  }
  __syncthreads();
  for (int y = threadIdx.y; y < 32; y += 8) {
    const int row = row0 + threadIdx.x, col = col0 + y;
    if (row < rows && col < cols) out[col * rows + row] = tile[threadIdx.x][y];
  }
}

}  // namespace

extern "C" __global__ void transpose_shared(const float* in, float* out, int rows, int cols) {
  transpose<33>(in, out, rows, cols);
}

extern "C" __global__ void transpose_conflicts(const float* in, float* out, int rows, int cols) {
  transpose<32>(in, out, rows, cols);
}

extern "C" __global__ void __launch_bounds__(256)
    histogram(const uint8_t* in, int n, unsigned* bins) {
  __shared__ unsigned own[256];
  own[threadIdx.x] = 0;
  __syncthreads();
  for (int i = blockIdx.x * 256 + threadIdx.x; i < n; i += gridDim.x * 256) {
    atomicAdd(&own[in[i]], 1u);
  }
  __syncthreads();
  if (own[threadIdx.x] != 0) atomicAdd(&bins[threadIdx.x], own[threadIdx.x]);
}

extern "C" __global__ void spin_chain(int* out, unsigned* flags) {
  if (threadIdx.x != 0) return;
  const unsigned block = blockIdx.x;
  int before = 0;
  if (block > 0) {
    unsigned seen;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                   : "=r"(seen)
                   : "l"(flags + block - 1)
                   : "memory");
    } while (seen == 0);
    before = out[block - 1];
  }
  out[block] = before + block;
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flags + block), "r"(1) : "memory");
}
