// 8 x 8 matrices between shared memory and registers; one warp, block 32, 16-bit elements.
//   matrices_load     out [3][32][4] = registers of ldmatrix x1, x2 and x4 (unused registers 0),
//                     from in [4][8][8]
//   matrices_load_trans   out [32][4] = registers of ldmatrix x4 .trans
//   matrices_load_at  out [2][32][4] = registers of ldmatrix x4 and x4 .trans, whose addresses are
//                     put together by the wrapper
//   matrices_transpose    out [8][8] = the transpose of in [8][8], by movmatrix
//   matrices_store    (sm_90) out [2][4][8][8] = stmatrix x4, plain and .trans, of registers
//                     in [32][4]
//   mma_tf32          (any) d [16][8] = a [16][8] b [8][8], f32 inputs rounded to tf32
#include "ptx.cuh"

namespace {

__device__ __forceinline__ uint32_t row_address(const uint16_t* tile) {
  return ptx::shared_address(tile + threadIdx.x * 8);
}

}  // namespace

extern "C" __global__ void matrices_load(const uint4* in, uint32_t* out) {
  __shared__ __align__(16) uint16_t tile[4 * 64];
  const int lane = threadIdx.x;
  reinterpret_cast<uint4*>(tile)[lane] = in[lane];
  __syncwarp();
  uint32_t one[1], two[2], four[4];
  ptx::ldmatrix_x1(one, row_address(tile));
  ptx::ldmatrix_x2(two, row_address(tile));
  ptx::ldmatrix_x4(four, row_address(tile));
  for (int i = 0; i < 4; ++i) {
    out[lane * 4 + i] = i == 0 ? one[0] : 0;
    out[128 + lane * 4 + i] = i == 0 ? two[0] : i == 1 ? two[1] : 0;
    out[256 + lane * 4 + i] = four[i];
  }
}

extern "C" __global__ void matrices_load_trans(const uint4* in, uint4* out) {
  __shared__ __align__(16) uint16_t tile[4 * 64];
  const int lane = threadIdx.x;
  reinterpret_cast<uint4*>(tile)[lane] = in[lane];
  __syncwarp();
  uint32_t r[4];
  ptx::ldmatrix_x4_trans(r, row_address(tile));
  out[lane] = make_uint4(r[0], r[1], r[2], r[3]);
}

extern "C" __global__ void matrices_load_at(const uint4* in, uint4* out) {
  __shared__ __align__(16) uint16_t tile[4 * 64];
  const int lane = threadIdx.x;
  reinterpret_cast<uint4*>(tile)[lane] = in[lane];
  __syncwarp();
  const uint32_t offset = 1040, toggle = 0x50;
  const uint32_t start = (row_address(tile) - offset) ^ toggle;
  uint32_t r[4];
  ptx::ldmatrix_x4_at(r, start, toggle, offset);
  out[lane] = make_uint4(r[0], r[1], r[2], r[3]);
  ptx::ldmatrix_x4_trans_at(r, start, toggle, offset);
  out[32 + lane] = make_uint4(r[0], r[1], r[2], r[3]);
}

extern "C" __global__ void matrices_transpose(const uint32_t* in, uint32_t* out) {
  // Lane l holds row l / 4, columns 2 (l % 4) and the next: word l of the row-major matrix.
  out[threadIdx.x] = ptx::movmatrix_trans(in[threadIdx.x]);
}

extern "C" __global__ void mma_tf32(const float* a, const float* b, float* d) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const uint32_t fa[4] = {ptx::cvt_rna_tf32(a[g * 8 + t]), ptx::cvt_rna_tf32(a[(g + 8) * 8 + t]),
                          ptx::cvt_rna_tf32(a[g * 8 + t + 4]),
                          ptx::cvt_rna_tf32(a[(g + 8) * 8 + t + 4])};
  float acc[4] = {};
  ptx::mma_m16n8k8_tf32(acc, fa, ptx::cvt_rna_tf32(b[t * 8 + g]),
                        ptx::cvt_rna_tf32(b[(t + 4) * 8 + g]));
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = acc[i];
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
extern "C" __global__ void matrices_store(const uint4* in, uint4* out) {
  __shared__ __align__(16) uint16_t tile[2][4 * 64];
  const int lane = threadIdx.x;
  const uint4 v = in[lane];
  const uint32_t r[4] = {v.x, v.y, v.z, v.w};
  ptx::stmatrix_x4(row_address(tile[0]), r);
  ptx::stmatrix_x4_trans(row_address(tile[1]), r);
  __syncwarp();
  for (int i = 0; i < 2; ++i) out[i * 32 + lane] = reinterpret_cast<uint4*>(tile[i])[lane];
}
#endif
