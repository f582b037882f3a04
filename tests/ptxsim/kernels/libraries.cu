// Other people's device code: CUB, libcu++, cooperative groups and the mathematical library, as
// they compile. Launch: block 128. n is the number of threads of the grid.
//   cub_block    sum, scan and sort of each block: out [3][n] from x [n]
//   math_library out [13][n] f32 from x [n]: functions with tables, slow paths and local arrays
//   math_double  out [8][n] f64 from x [n] f32
//   groups       out [2][n] from x [n]: sums of tiles of 8 lanes; population of x & 1 in each warp
//   pipelines    out [n] f32 from x [4][n]: sums of the four, through two buffers in shared memory
//   barriers     out [n] from x [n]: reversed within the block
#include <cooperative_groups.h>
#include <cub/cub.cuh>
#include <cuda/barrier>
#include <cuda/pipeline>

namespace cg = cooperative_groups;

namespace {
constexpr int kBlock = 128;
__device__ __forceinline__ int index() { return blockIdx.x * kBlock + threadIdx.x; }
}  // namespace

extern "C" __global__ void cub_block(const int* x, int* out, int n) {
  using Reduce = cub::BlockReduce<int, kBlock>;
  using Scan = cub::BlockScan<int, kBlock, cub::BLOCK_SCAN_RAKING>;
  using Sort = cub::BlockRadixSort<int, kBlock, 1>;
  __shared__ union {
    Reduce::TempStorage reduce;
    Scan::TempStorage scan;
    Sort::TempStorage sort;
  } shared;
  const int i = index();
  const int value = x[i];
  const int sum = Reduce(shared.reduce).Sum(value);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
  __syncthreads();
  int prefix;
  Scan(shared.scan).InclusiveSum(value, prefix);
  out[n + i] = prefix;
  __syncthreads();
  int key[1] = {value};
  Sort(shared.sort).Sort(key);
  out[2 * n + i] = key[0];
}

extern "C" __global__ void math_library(const float* xs, float* out, int n) {
  const int i = index();
  const float x = xs[i];
  float* next = out + i;
  auto put = [&](float value) {
    *next = value;
    next += n;
  };
  put(sinf(x * 1e5f));  // an argument reduction with a local array
  put(cosf(x));
  put(tanf(x));
  put(powf(fabsf(x), 1.3f));
  put(logf(fabsf(x) + 1e-3f));
  put(erff(x));
  put(cbrtf(x));
  put(atan2f(x, 1.5f));
  put(fmodf(x, 0.7f));
  put(tanhf(x));
  put(log1pf(fabsf(x)));
  put(hypotf(x, 2.0f));
  put(sinhf(x));
}

extern "C" __global__ void math_double(const float* xs, double* out, int n) {
  const int i = index();
  const double x = xs[i];
  double* next = out + i;
  auto put = [&](double value) {
    *next = value;
    next += n;
  };
  put(exp(x));
  put(sin(x));
  put(sqrt(fabs(x)));
  put(x / 3.1);
  put(pow(fabs(x), 0.3));
  put(log(fabs(x) + 1.0));
  put(fmod(x, 0.3));
  put(copysign(floor(x), -x));
}

extern "C" __global__ void groups(const int* x, int* out, int n) {
  const auto warp = cg::tiled_partition<32>(cg::this_thread_block());
  const auto tile = cg::tiled_partition<8>(warp);
  const int i = index();
  int sum = x[i];
  for (int offset = tile.size() / 2; offset > 0; offset /= 2) sum += tile.shfl_xor(sum, offset);
  out[i] = sum;
  out[n + i] = __popc(warp.ballot(x[i] & 1));
}

extern "C" __global__ void pipelines(const float* x, float* out, int n) {
  __shared__ float tile[2][kBlock];
  __shared__ cuda::pipeline_shared_state<cuda::thread_scope_block, 2> state;
  const auto block = cg::this_thread_block();
  auto pipeline = cuda::make_pipeline(block, &state);
  auto load = [&](int k) {
    pipeline.producer_acquire();
    const float* from = x + k * n + blockIdx.x * kBlock;
    cuda::memcpy_async(block, tile[k % 2], from, sizeof(tile[0]), pipeline);
    pipeline.producer_commit();
  };
  load(0);
  load(1);
  float sum = 0.0f;
  for (int k = 0; k < 4; ++k) {
    pipeline.consumer_wait();
    sum += tile[k % 2][threadIdx.x ^ 1];  // copied by another thread
    pipeline.consumer_release();
    if (k + 2 < 4) load(k + 2);
  }
  out[index() ^ 1] = sum;
}

extern "C" __global__ void barriers(const int* x, int* out) {
  __shared__ cuda::barrier<cuda::thread_scope_block> barrier;
  __shared__ int tile[kBlock];
  if (threadIdx.x == 0) init(&barrier, kBlock);
  __syncthreads();
  tile[threadIdx.x] = x[index()];
  barrier.wait(barrier.arrive());
  out[index()] = tile[kBlock - 1 - threadIdx.x];
}
