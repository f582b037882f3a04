// Bulk and tensor copies, sm_90; block 128, grid 1 unless said. The tile goes to shared memory and
// its dense bytes (swizzled, if the map says so) are copied out, so that each map can be checked
// alone.
//   tensor_load_{1..5}d   out [words] = the tile at (c0 ..), as it lies in shared memory
//   tensor_store_2d, tensor_store_3d, tensor_add_2d   the words of `in`, as they are to lie in
//   shared
//                 memory, stored to (or added to) the tile at the coordinates
//   bulk_scale    out = factor in, through shared memory with 1-D bulk copies: grid (n / 256),
//                 block 256; with `add` the result is added to out instead
//   async_ring    out = in + 1 by cp.async into a buffer guarded by an mbarrier
//                 (cp.async.mbarrier.arrive.noinc); block 128, n = 128
// `words` (4 bytes each) is at most 8192.
#include "ptx.cuh"

namespace {

extern __shared__ __align__(1024) uint32_t tile[];

// Runs one load into `tile`, waits for `words` words and copies them out.
template <class Load>
__device__ __forceinline__ void load_tile(uint32_t* out, int words, Load load) {
  __shared__ __align__(8) uint64_t full;
  const uint32_t barrier = ptx::shared_address(&full);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(barrier, words * 4);
    load(ptx::shared_address(tile), barrier);
  }
  ptx::mbarrier_wait_parity(barrier, 0);
  for (int i = threadIdx.x; i < words; i += blockDim.x) out[i] = tile[i];
  __syncthreads();
  if (threadIdx.x == 0) ptx::mbarrier_inval(barrier);
}

// Fills `tile` from `in` and runs one store.
template <class Store>
__device__ __forceinline__ void store_tile(const uint32_t* in, int words, Store store) {
  for (int i = threadIdx.x; i < words; i += blockDim.x) tile[i] = in[i];
  ptx::fence_proxy_async_shared();
  __syncthreads();
  if (threadIdx.x == 0) {
    store(ptx::shared_address(tile));
    ptx::cp_async_bulk_commit_group();
    ptx::cp_async_bulk_wait_group<0>();
  }
}

using Map = ptx::TensorMap;

}  // namespace

extern "C" __global__ void tensor_load_1d(const __grid_constant__ Map map, uint32_t* out, int words,
                                          int c0) {
  load_tile(out, words, [&](uint32_t to, uint32_t barrier) {
    ptx::cp_async_bulk_tensor_load_1d(to, &map, c0, barrier);
  });
}

extern "C" __global__ void tensor_load_2d(const __grid_constant__ Map map, uint32_t* out, int words,
                                          int c0, int c1) {
  load_tile(out, words, [&](uint32_t to, uint32_t barrier) {
    ptx::cp_async_bulk_tensor_load_2d(to, &map, c0, c1, barrier);
  });
}

extern "C" __global__ void tensor_load_3d(const __grid_constant__ Map map, uint32_t* out, int words,
                                          int c0, int c1, int c2) {
  load_tile(out, words, [&](uint32_t to, uint32_t barrier) {
    ptx::cp_async_bulk_tensor_load_3d(to, &map, c0, c1, c2, barrier);
  });
}

extern "C" __global__ void tensor_load_4d(const __grid_constant__ Map map, uint32_t* out, int words,
                                          int c0, int c1, int c2, int c3) {
  load_tile(out, words, [&](uint32_t to, uint32_t barrier) {
    ptx::cp_async_bulk_tensor_load_4d(to, &map, c0, c1, c2, c3, barrier);
  });
}

extern "C" __global__ void tensor_load_5d(const __grid_constant__ Map map, uint32_t* out, int words,
                                          int c0, int c1, int c2, int c3, int c4) {
  load_tile(out, words, [&](uint32_t to, uint32_t barrier) {
    ptx::cp_async_bulk_tensor_load_5d(to, &map, c0, c1, c2, c3, c4, barrier);
  });
}

extern "C" __global__ void tensor_store_2d(const __grid_constant__ Map map, const uint32_t* in,
                                           int words, int c0, int c1) {
  store_tile(in, words,
             [&](uint32_t from) { ptx::cp_async_bulk_tensor_store_2d(&map, c0, c1, from); });
}

extern "C" __global__ void tensor_store_3d(const __grid_constant__ Map map, const uint32_t* in,
                                           int words, int c0, int c1, int c2) {
  store_tile(in, words,
             [&](uint32_t from) { ptx::cp_async_bulk_tensor_store_3d(&map, c0, c1, c2, from); });
}

extern "C" __global__ void tensor_add_2d(const __grid_constant__ Map map, const uint32_t* in,
                                         int words, int c0, int c1) {
  store_tile(in, words,
             [&](uint32_t from) { ptx::cp_reduce_async_bulk_tensor_add_2d(&map, c0, c1, from); });
}

extern "C" __global__ void __launch_bounds__(256)
    bulk_scale(const float* in, float* out, float factor, int add) {
  __shared__ __align__(128) float buffer[256];
  __shared__ __align__(8) uint64_t full;
  const uint32_t barrier = ptx::shared_address(&full), at = ptx::shared_address(buffer);
  ptx::griddepcontrol_wait();  // nothing to wait for: the launch has no predecessor
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(barrier, sizeof(buffer));
    ptx::cp_async_bulk_load(at, in + blockIdx.x * 256, sizeof(buffer), barrier);
  }
  __syncthreads();  // the barrier exists
  ptx::mbarrier_wait_parity(barrier, 0);
  ptx::griddepcontrol_launch_dependents();
  buffer[threadIdx.x] *= factor;
  ptx::fence_proxy_async_shared();
  __syncthreads();
  if (threadIdx.x == 0) {
    float* to = out + blockIdx.x * 256;
    if (add) {
      ptx::cp_reduce_async_bulk_add_f32(to, at, sizeof(buffer));
    } else {
      ptx::cp_async_bulk_store(to, at, sizeof(buffer));
    }
    ptx::cp_async_bulk_commit_group();
    ptx::cp_async_bulk_wait_group_read<0>();
  }
}

extern "C" __global__ void async_ring(const float* in, float* out) {
  __shared__ float buffer[128];
  __shared__ __align__(8) uint64_t full;
  const uint32_t barrier = ptx::shared_address(&full);
  if (threadIdx.x == 0) ptx::mbarrier_init(barrier, 128);
  __syncthreads();
  ptx::cp_async_4(ptx::shared_address(&buffer[threadIdx.x]), in + threadIdx.x);
  // Arrives once this thread's copies have landed.
  ptx::cp_async_mbarrier_arrive_noinc(barrier);
  ptx::mbarrier_wait_parity(barrier, 0);
  out[threadIdx.x] = buffer[127 - threadIdx.x] + 1.0f;
}
