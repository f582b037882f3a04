// Elementwise arithmetic, one row of n results per operation, in the order written. Launch: block
// 128, grid (ceil(n / 128)).
//   math_f32     out [18][n] f32 from x, y: x + y, x * y, x / y, fdividef(x, y), sqrt|x|, rsqrt|y|,
//                exp(x), log|y|, tanh.approx(x), fma(x, y, x), min, max, 1 / y (rn), floor(x),
//                copysign(x, y), exp2(x) (approximate, flushed), log2|y|
//                and 1 / y (approximate)
//   math_round   out [8][n] i32 from x: bits of x as f16, as bf16, int towards zero, int nearest,
//   as
//                u32 (saturating), int down, int up, bits of saturate(x)
//   math_i32     out [20][n] i32 from x, y: x + y, x * y, mulhi, x / y, x % y, u / u, x >> (y &
//   31),
//                u >> (y & 31), x << (y & 31), min, max, abs x, popc, clz, brev, byte_perm(x, y,
//                0x3175), funnel shift left by 7, dp: x y + y, bit field (y into x at 5, 9 bits),
//                three-way logic (x & y) ^ ~x
//   math_i64     out [10][n] i64 from x, y: x + y, x * y, mulhi, x / y, x % y, x >> (y & 63),
//                u >> (y & 63), min, popcount, clz
//   math_half2_{f16,bf16}   out [10][n] packed pairs from x, y: x + y,
//                x - y, x * y, fma(x, y, x), min, max, -x, |x|, x < y ? 1 : 0, x + 1 in f32 rounded
// Divisors are not zero; mulhi is the upper half of the product.
#include "ptx.cuh"

namespace {

// Writes a thread's results one below the other.
template <class T>
struct Rows {
  T* next;
  int n;
  __device__ __forceinline__ void operator()(T value) {
    *next = value;
    next += n;
  }
};

template <class T>
__device__ __forceinline__ Rows<T> rows(T* out, int i, int n) {
  return {out + i, n};
}

__device__ __forceinline__ int index() { return blockIdx.x * blockDim.x + threadIdx.x; }

}  // namespace

extern "C" __global__ void math_f32(const float* xs, const float* ys, float* out, int n) {
  const int i = index();
  if (i >= n) return;
  const float x = xs[i], y = ys[i];
  auto put = rows(out, i, n);
  put(__fadd_rn(x, y));
  put(__fmul_rn(x, y));
  put(x / y);
  put(__fdividef(x, y));
  put(sqrtf(fabsf(x)));
  put(rsqrtf(fabsf(y)));
  put(expf(x));
  put(logf(fabsf(y)));
  put(ptx::tanh_approx(x));
  put(fmaf(x, y, x));
  put(fminf(x, y));
  put(fmaxf(x, y));
  put(__frcp_rn(y));
  put(floorf(x));
  put(copysignf(x, y));
  put(ptx::ex2_approx_ftz(x));
  put(ptx::lg2_approx(fabsf(y)));
  put(ptx::rcp_approx(y));
}

extern "C" __global__ void math_round(const float* xs, int* out, int n) {
  const int i = index();
  if (i >= n) return;
  const float x = xs[i];
  auto put = rows(out, i, n);
  put(__half_as_ushort(__float2half_rn(x)));
  put(__bfloat16_as_ushort(__float2bfloat16_rn(x)));
  put(__float2int_rz(x));
  put(__float2int_rn(x));
  put(static_cast<int>(__float2uint_rz(x)));
  put(__float2int_rd(x));
  put(__float2int_ru(x));
  put(__float_as_int(__saturatef(x)));
}

extern "C" __global__ void math_i32(const int* xs, const int* ys, int* out, int n) {
  const int i = index();
  if (i >= n) return;
  const int x = xs[i], y = ys[i];
  const unsigned ux = x, uy = y;
  auto put = rows(out, i, n);
  put(ux + uy);
  put(ux * uy);
  put(__mulhi(x, y));
  put(x / y);
  put(x % y);
  put(ux / uy);
  put(x >> (y & 31));
  put(ux >> (y & 31));
  put(ux << (y & 31));
  put(min(x, y));
  put(max(x, y));
  put(abs(x));
  put(__popc(x));
  put(__clz(x));
  put(__brev(x));
  put(__byte_perm(x, y, 0x3175));
  put(__funnelshift_l(x, y, 7));
  put(ux * uy + uy);
  int inserted;
  asm("bfi.b32 %0, %1, %2, 5, 9;" : "=r"(inserted) : "r"(y), "r"(x));
  put(inserted);
  put((x & y) ^ ~x);
}

extern "C" __global__ void math_i64(const int64_t* xs, const int64_t* ys, int64_t* out, int n) {
  const int i = index();
  if (i >= n) return;
  const int64_t x = xs[i], y = ys[i];
  const uint64_t ux = x, uy = y;
  auto put = rows(out, i, n);
  put(ux + uy);
  put(ux * uy);
  put(__mul64hi(x, y));
  put(x / y);
  put(x % y);
  put(x >> (y & 63));
  put(ux >> (y & 63));
  put(x < y ? x : y);
  put(__popcll(x));
  put(__clzll(x));
}

namespace {

template <class T>
__device__ __forceinline__ void half2_rows(const T* xs, const T* ys, T* out, int n) {
  const int i = index();
  if (i >= n) return;
  const T x = xs[i], y = ys[i];
  auto put = rows(out, i, n);
  put(__hadd2_rn(x, y));
  put(__hsub2_rn(x, y));
  put(__hmul2_rn(x, y));
  put(__hfma2(x, y, x));
  put(__hmin2(x, y));
  put(__hmax2(x, y));
  put(__hneg2(x));
  put(__habs2(x));
  put(__hlt2(x, y));
}

}  // namespace

extern "C" __global__ void math_half2_f16(const __half2* xs, const __half2* ys, __half2* out,
                                          int n) {
  half2_rows(xs, ys, out, n);
  const int i = index();
  if (i >= n) return;
  const float2 x = __half22float2(xs[i]);
  out[9 * n + i] = __floats2half2_rn(x.x + 1.0f, x.y + 1.0f);
}

extern "C" __global__ void math_half2_bf16(const __nv_bfloat162* xs, const __nv_bfloat162* ys,
                                           __nv_bfloat162* out, int n) {
  half2_rows(xs, ys, out, n);
  const int i = index();
  if (i >= n) return;
  const float2 x = __bfloat1622float2(xs[i]);
  out[9 * n + i] = __floats2bfloat162_rn(x.x + 1.0f, x.y + 1.0f);
}
