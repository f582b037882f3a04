// The part of cuBLAS that candle's matmul calls: products on the host, by way of the driver.
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <library_types.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace {

enum Status { SUCCESS = 0, INVALID_VALUE = 7, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15 };
enum Operation { AS_IS = 0, TRANSPOSED = 1 };

struct Handle {
  CUstream stream;
};

/// Matrices in device memory, by columns: `count` of them, `stride` elements apart.
struct Matrices {
  CUdeviceptr start;
  cudaDataType type;
  int64_t rows, columns, leading, stride;

  size_t bytes() const { return type == CUDA_R_64F ? 8 : type == CUDA_R_32F ? 4 : 2; }
  CUdeviceptr matrix(int index) const { return start + index * stride * bytes(); }
  /// Elements from the first to the last of one matrix.
  size_t extent() const { return (columns - 1) * leading + rows; }
};

double load(const void* data, size_t index, cudaDataType type) {
  switch (type) {
    case CUDA_R_16F: return __half2float(static_cast<const __half*>(data)[index]);
    case CUDA_R_16BF: return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[index]);
    case CUDA_R_32F: return static_cast<const float*>(data)[index];
    default: return static_cast<const double*>(data)[index];
  }
}

void store(void* data, size_t index, cudaDataType type, double value) {
  switch (type) {
    case CUDA_R_16F: static_cast<__half*>(data)[index] = __float2half(value); break;
    case CUDA_R_16BF: static_cast<__nv_bfloat16*>(data)[index] = __float2bfloat16(value); break;
    case CUDA_R_32F: static_cast<float*>(data)[index] = value; break;
    default: static_cast<double*>(data)[index] = value;
  }
}

/// One matrix on the host, without the space between its columns.
template <typename Sum>
CUresult read(const Matrices& from, int index, CUstream stream, std::vector<Sum>* to) {
  std::vector<char> raw(from.extent() * from.bytes());
  CUresult code = cuMemcpyDtoHAsync(raw.data(), from.matrix(index), raw.size(), stream);
  if (!code) code = cuStreamSynchronize(stream);
  to->resize(from.rows * from.columns);
  for (int64_t column = 0; column < from.columns; column++)
    for (int64_t row = 0; row < from.rows; row++)
      (*to)[column * from.rows + row] =
          load(raw.data(), column * from.leading + row, from.type);
  return code;
}

/// The columns of one matrix; what lies between them stays.
template <typename Sum>
CUresult write(const Matrices& to, int index, CUstream stream, const std::vector<Sum>& from) {
  std::vector<char> raw(to.rows * to.bytes());
  for (int64_t column = 0; column < to.columns; column++) {
    for (int64_t row = 0; row < to.rows; row++)
      store(raw.data(), row, to.type, from[column * to.rows + row]);
    CUdeviceptr place = to.matrix(index) + column * to.leading * to.bytes();
    CUresult code = cuMemcpyHtoDAsync(place, raw.data(), raw.size(), stream);
    if (!code) code = cuStreamSynchronize(stream);
    if (code) return code;
  }
  return CUDA_SUCCESS;
}

/// The matrices of a product as BLAS describes them: sizes without and with `TRANSPOSED`.
struct Operand {
  Operation operation;
  CUdeviceptr start;
  cudaDataType type;
  int leading;
  long long stride;

  Matrices matrices(int rows, int columns) const {
    if (operation != AS_IS) std::swap(rows, columns);
    return {start, type, rows, columns, leading, stride};
  }
};

/// c = alpha a b + beta c, `batch` times, summed in `Sum`: a has m rows and k columns, b k and n.
template <typename Sum>
Status product(CUstream stream, int m, int n, int k, Sum alpha, const Operand& a, const Operand& b,
               Sum beta, const Operand& c, int batch) {
  for (cudaDataType type : {a.type, b.type, c.type})
    if (type != CUDA_R_64F && type != CUDA_R_32F && type != CUDA_R_16F && type != CUDA_R_16BF)
      return NOT_SUPPORTED;
  if (m <= 0 || n <= 0 || k <= 0 || batch < 0) return INVALID_VALUE;
  Matrices as = a.matrices(m, k), bs = b.matrices(k, n), cs = c.matrices(m, n);
  // Elements of a along its row, of b along its column.
  int64_t step_a = a.operation == AS_IS ? m : 1, step_b = b.operation == AS_IS ? 1 : n;
  int64_t row_a = a.operation == AS_IS ? 1 : k, column_b = b.operation == AS_IS ? k : 1;

  std::vector<Sum> left, right, sums;
  for (int index = 0; index < batch; index++) {
    CUresult code = read(as, index, stream, &left);
    if (!code) code = read(bs, index, stream, &right);
    sums.assign(int64_t{m} * n, 0);
    if (!code && beta != 0) code = read(cs, index, stream, &sums);
    if (code) return EXECUTION_FAILED;
    for (int64_t column = 0; column < n; column++) {
      for (int64_t row = 0; row < m; row++) {
        Sum sum = 0;
        for (int64_t i = 0; i < k; i++)
          sum += left[row * row_a + i * step_a] * right[column * column_b + i * step_b];
        Sum& place = sums[column * m + row];
        place = alpha * sum + beta * place;
      }
    }
    if (write(cs, index, stream, sums)) return EXECUTION_FAILED;
  }
  return SUCCESS;
}

}  // namespace

extern "C" {

int cublasCreate_v2(Handle** handle) {
  *handle = new Handle{nullptr};
  return SUCCESS;
}

int cublasDestroy_v2(Handle* handle) {
  delete handle;
  return SUCCESS;
}

int cublasSetStream_v2(Handle* handle, CUstream stream) {
  handle->stream = stream;
  return SUCCESS;
}

int cublasDgemmStridedBatched(Handle* handle, Operation op_a, Operation op_b, int m, int n, int k,
                              const double* alpha, CUdeviceptr a, int lda, long long stride_a,
                              CUdeviceptr b, int ldb, long long stride_b, const double* beta,
                              CUdeviceptr c, int ldc, long long stride_c, int batch) {
  return product(handle->stream, m, n, k, *alpha, {op_a, a, CUDA_R_64F, lda, stride_a},
                 {op_b, b, CUDA_R_64F, ldb, stride_b}, *beta,
                 {AS_IS, c, CUDA_R_64F, ldc, stride_c}, batch);
}

/// With sums in f32, which candle asks for unless it is told otherwise.
int cublasGemmStridedBatchedEx(Handle* handle, Operation op_a, Operation op_b, int m, int n, int k,
                               const float* alpha, CUdeviceptr a, cudaDataType type_a, int lda,
                               long long stride_a, CUdeviceptr b, cudaDataType type_b, int ldb,
                               long long stride_b, const float* beta, CUdeviceptr c,
                               cudaDataType type_c, int ldc, long long stride_c, int batch,
                               int compute, int /*algorithm*/) {
  constexpr int COMPUTE_32F = 68;
  if (compute != COMPUTE_32F) return NOT_SUPPORTED;
  return product(handle->stream, m, n, k, *alpha, {op_a, a, type_a, lda, stride_a},
                 {op_b, b, type_b, ldb, stride_b}, *beta, {AS_IS, c, type_c, ldc, stride_c}, batch);
}

}  // extern "C"
