// The part of the CUDA runtime that the programs call, on the driver they are linked with: nvcc's
// own is left out (-cudart none), since it asks the driver for tables that nothing documents.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

namespace {

struct Kernel {
  const void* image;
  const char* name;
  CUfunction function;
};

/// By the address of the host's stub.
std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> all;
  return all;
}

cudaError_t last = cudaSuccess;

/// The driver's codes are the runtime's.
cudaError_t result(CUresult code) {
  if (code != CUDA_SUCCESS) last = static_cast<cudaError_t>(code);
  return static_cast<cudaError_t>(code);
}

CUresult start() {
  static const CUresult code = [] {
    CUcontext context;
    CUresult code = cuInit(0);
    if (!code) code = cuDevicePrimaryCtxRetain(&context, 0);
    return code ? code : cuCtxSetCurrent(context);
  }();
  return code;
}

/// Loads a kernel's module, once, and finds it there.
CUresult find(const void* stub, CUfunction* function) {
  static std::map<const void*, CUmodule> modules;
  auto kernel = kernels().find(stub);
  if (kernel == kernels().end()) return CUDA_ERROR_INVALID_HANDLE;
  auto& [image, name, found] = kernel->second;
  CUresult code = start();
  CUmodule& module = modules[image];
  if (!code && !module) code = cuModuleLoadData(&module, image);
  if (!code && !found) code = cuModuleGetFunction(&found, module, name);
  *function = found;
  return code;
}

CUdeviceptr address(const void* pointer) { return reinterpret_cast<CUdeviceptr>(pointer); }

cudaError_t launch(const cudaLaunchConfig_t& config, const void* stub, void** args) {
  static_assert(sizeof(CUlaunchAttribute) == sizeof(cudaLaunchAttribute), "one layout");
  std::vector<CUlaunchAttribute> attributes(config.numAttrs);
  if (config.numAttrs)
    std::memcpy(attributes.data(), config.attrs, config.numAttrs * sizeof(CUlaunchAttribute));
  const auto& [grid, block] = std::pair(config.gridDim, config.blockDim);
  CUlaunchConfig passed{grid.x,
                        grid.y,
                        grid.z,
                        block.x,
                        block.y,
                        block.z,
                        static_cast<unsigned>(config.dynamicSmemBytes),
                        config.stream,
                        attributes.data(),
                        config.numAttrs};
  CUfunction function;
  CUresult code = find(stub, &function);
  return result(code ? code : cuLaunchKernelEx(&passed, function, args, nullptr));
}

/// What `<<<>>>` leaves for the stub.
std::vector<cudaLaunchConfig_t> configurations;

}  // namespace

// ---- What the code that nvcc generates for the host calls

extern "C" {

struct FatBinary {
  int magic, version;
  void* image;
  void* file;
};

void** __cudaRegisterFatBinary(FatBinary* binary) { return &binary->image; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void** binary, const char* stub, char*, const char* name, int, uint3*,
                            uint3*, dim3*, dim3*, int*) {
  kernels()[stub] = {*binary, name, nullptr};
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configurations.push_back({grid, block, shared, stream, nullptr, 0});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  cudaLaunchConfig_t config = configurations.back();
  configurations.pop_back();
  *grid = config.gridDim;
  *block = config.blockDim;
  *shared = config.dynamicSmemBytes;
  *static_cast<cudaStream_t*>(stream) = config.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(stub));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args,
                               size_t shared, cudaStream_t stream) {
  return launch({grid, block, shared, stream, nullptr, 0}, kernel, args);
}

// ---- What programs call

cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void** args, size_t shared,
                             cudaStream_t stream) {
  return launch({grid, block, shared, stream, nullptr, 0}, stub, args);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* stub, void** args) {
  return launch(*config, stub, args);
}
cudaError_t cudaFuncSetAttribute(const void* stub, cudaFuncAttribute attribute, int value) {
  CUfunction function;
  CUresult code = find(stub, &function);
  auto number = static_cast<CUfunction_attribute>(attribute);
  return result(code ? code : cuFuncSetAttribute(function, number, value));
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return result(start());
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  CUresult code = start();
  auto number = static_cast<CUdevice_attribute>(attribute);
  return result(code ? code : cuDeviceGetAttribute(value, number, device));
}
cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  CUresult code = start();
  return result(code ? code : cuMemAlloc(reinterpret_cast<CUdeviceptr*>(pointer), bytes));
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  if (kind == cudaMemcpyHostToDevice) return result(cuMemcpyHtoD(address(to), from, bytes));
  if (kind == cudaMemcpyDeviceToHost) return result(cuMemcpyDtoH(to, address(from), bytes));
  return result(CUDA_ERROR_NOT_SUPPORTED);
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  return result(cuMemsetD8Async(address(to), static_cast<unsigned char>(value), bytes, stream));
}
cudaError_t cudaDeviceSynchronize() { return result(cuCtxSynchronize()); }
cudaError_t cudaGetLastError() {
  cudaError_t code = last;
  last = cudaSuccess;
  return code;
}
const char* cudaGetErrorString(cudaError_t code) {
  const char* text = nullptr;
  cuGetErrorString(static_cast<CUresult>(code), &text);
  return text ? text : "unknown error";
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
  *function = dlsym(RTLD_DEFAULT, name);
  *status = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
}
