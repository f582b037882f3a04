// o = softmax(scale q kᵀ) v, flash attention forward with mma.sync: d = 128, bf16, optionally
// causal. q, k, v, o [heads][tokens][128]. One block per 64 queries of one head, 4 warps of 16
// queries; blocks of 64 keys; q stays in registers, probabilities go from accumulators to A
// fragments in place. Shared memory: q, k, v tiles of 64 rows of 256 bytes each, 16-byte chunks
// swizzled by row: 49152. The load of v overlaps the scores, the load of the next k overlaps
// softmax and the product with v. Launch: block 128, grid (ceil(tokens / 64), heads), dynamic
// shared memory 49152 bytes.
#include "ptx.cuh"

namespace {

constexpr int kD = 128, kTile = 64, kThreads = 128;
constexpr int kTileBytes = kTile * kD * 2;
using Bf16 = __nv_bfloat16;

__device__ __forceinline__ uint32_t at(int row, int chunk) {
  return row * 256 + ((chunk ^ (row & 7)) << 4);
}

// Rows `first` to `first + 63` of a [tokens][128] matrix; rows beyond the end are zero.
__device__ __forceinline__ void load_tile(uint32_t to, const Bf16* from, int first, int tokens) {
  for (int i = threadIdx.x; i < kTile * 16; i += kThreads) {
    const int r = i / 16, chunk = i % 16;
    const bool inside = first + r < tokens;
    const Bf16* source = inside ? from + int64_t{first + r} * kD + chunk * 8 : from;
    ptx::cp_async_16(to + at(r, chunk), source, inside);
  }
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffff, x, 1);
  return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// s = q kᵀ: 16 queries of this warp by 64 keys.
__device__ __forceinline__ void scores(float (&s)[8][4], const uint32_t (&q)[8][4], uint32_t k) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int kk = 0; kk < 8; ++kk) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t b[4];
      ptx::ldmatrix_x4(b, k + at(j * 16 + lane % 8 + lane / 16 * 8, kk * 2 + lane / 8 % 2));
      ptx::mma_m16n8k16<Bf16>(s[2 * j], q[kk], b[0], b[1]);
      ptx::mma_m16n8k16<Bf16>(s[2 * j + 1], q[kk], b[2], b[3]);
    }
  }
}

// o += p v, p = 16 queries by 64 keys in accumulator layout.
__device__ __forceinline__ void add_values(float (&o)[16][4], const float (&p)[8][4], uint32_t v) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int kk = 0; kk < 4; ++kk) {
    const auto &x = p[2 * kk], &y = p[2 * kk + 1];
    const uint32_t a[4] = {infini::pack<Bf16>(x[0], x[1]), infini::pack<Bf16>(x[2], x[3]),
                           infini::pack<Bf16>(y[0], y[1]), infini::pack<Bf16>(y[2], y[3])};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, v + at(kk * 16 + lane % 16, j * 2 + lane / 16));
      ptx::mma_m16n8k16<Bf16>(o[2 * j], a, b[0], b[1]);
      ptx::mma_m16n8k16<Bf16>(o[2 * j + 1], a, b[2], b[3]);
    }
  }
}

// Running maximum and sum of one query row (two per thread), and its output so far.
struct Softmax {
  float top[2] = {-INFINITY, -INFINITY};
  float total[2] = {0.0f, 0.0f};  // of this thread's columns only, until the end

  // Turns scores (already scaled by log2 e) into weights and rescales what was summed before.
  __device__ __forceinline__ void update(float (&s)[8][4], float (&o)[16][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float best = top[half];
#pragma unroll
      for (int j = 0; j < 8; ++j) best = fmaxf(best, fmaxf(s[j][2 * half], s[j][2 * half + 1]));
      best = quad_max(best);
      const float shrink = ptx::ex2_approx_ftz(top[half] - best);
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          s[j][i] = ptx::ex2_approx_ftz(s[j][i] - best);
          sum += s[j][i];
        }
      }
      total[half] = total[half] * shrink + sum;
      top[half] = best;
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        o[j][2 * half] *= shrink;
        o[j][2 * half + 1] *= shrink;
      }
    }
  }
};

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads)
    attention_d128(const Bf16* __restrict__ q, const Bf16* __restrict__ k,
                   const Bf16* __restrict__ v, Bf16* __restrict__ o, int tokens, float scale,
                   int causal) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const uint32_t tile_q = ptx::shared_address(memory), tile_k = tile_q + kTileBytes,
                 tile_v = tile_k + kTileBytes;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first = blockIdx.x * kTile;
  const int64_t head = int64_t{blockIdx.y} * tokens * kD;
  const int end = causal ? min(tokens, first + kTile) : tokens;
  const int row = first + warp * 16 + lane / 4;  // and row + 8
  const float factor = scale * 1.44269504f;

  load_tile(tile_q, q + head, first, tokens);
  load_tile(tile_k, k + head, 0, tokens);
  ptx::cp_async_commit_group();
  uint32_t fq[8][4];
  float acc[16][4] = {};
  Softmax softmax;

  for (int start = 0; start < end; start += kTile) {
    load_tile(tile_v, v + head, start, tokens);
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<1>();
    __syncthreads();  // k (and q, the first time) is there for all
    if (start == 0) {
#pragma unroll
      for (int kk = 0; kk < 8; ++kk) {
        ptx::ldmatrix_x4(fq[kk], tile_q + at(warp * 16 + lane % 16, kk * 2 + lane / 16));
      }
    }
    float s[8][4] = {};
    scores(s, fq, tile_k);
    __syncthreads();  // all have read k
    if (start + kTile < end) load_tile(tile_k, k + head, start + kTile, tokens);
    ptx::cp_async_commit_group();

#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = start + j * 8 + lane % 4 * 2 + i % 2;
        const bool visible = key < tokens && (!causal || key <= row + i / 2 * 8);
        s[j][i] = visible ? s[j][i] * factor : -INFINITY;
      }
    }
    softmax.update(s, acc);

    ptx::cp_async_wait_group<1>();
    __syncthreads();  // v is there for all
    add_values(acc, s, tile_v);
    __syncthreads();  // all have read v
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float inverse = 1.0f / quad_sum(softmax.total[half]);
    if (row + half * 8 >= tokens) continue;
    Bf16* to = o + head + int64_t{row + half * 8} * kD + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      *reinterpret_cast<uint32_t*>(to + j * 8) =
          infini::pack<Bf16>(acc[j][2 * half] * inverse, acc[j][2 * half + 1] * inverse);
    }
  }
}
