// c = a b in f32: one thread per element, no shared memory. a [m][k], b [k][n], c [m][n],
// row-major. Launch: block (16, 16), grid (ceil(n / 16), ceil(m / 16)).
#include <cstdint>

extern "C" __global__ void matmul_naive(const float* __restrict__ a, const float* __restrict__ b,
                                        float* __restrict__ c, int m, int n, int k) {
  const int col = blockIdx.x * blockDim.x + threadIdx.x;
  const int row = blockIdx.y * blockDim.y + threadIdx.y;
  if (row >= m || col >= n) return;
  float sum = 0.0f;
  for (int i = 0; i < k; ++i) sum += a[int64_t{row} * k + i] * b[int64_t{i} * n + col];
  c[int64_t{row} * n + col] = sum;
}
