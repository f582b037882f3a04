// What the programs share: arguments, device arrays that come from and go to files of the working
// directory, and an exit at the first failure.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

inline void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "%s failed: %s\n", what, cudaGetErrorString(cudaGetLastError()));
  std::exit(1);
}

inline void check(cudaError_t code, const char* what) { require(code == cudaSuccess, what); }

/// For CUTLASS' status.
template <class Status>
void require_success(Status status, const char* what) {
  require(status == Status::kSuccess, what);
}

/// The number after the program's name at `index`, from 1.
inline int argument(int argc, char** argv, int index) {
  require(index < argc, "reading the arguments");
  return std::atoi(argv[index]);
}

template <class T>
T* allocate(size_t count) {
  void* data = nullptr;
  check(cudaMalloc(&data, count * sizeof(T)), "cudaMalloc");
  return static_cast<T*>(data);
}

/// A device array with the contents of a file.
template <class T>
T* load(const char* path, size_t count) {
  std::vector<T> host(count);
  std::FILE* file = std::fopen(path, "rb");
  require(file && std::fread(host.data(), sizeof(T), count, file) == count, path);
  std::fclose(file);
  T* device = allocate<T>(count);
  check(cudaMemcpy(device, host.data(), count * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  return device;
}

/// Waits for the device and writes an array to a file.
template <class T>
void save(const char* path, const T* device, size_t count) {
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  std::vector<T> host(count);
  check(cudaMemcpy(host.data(), device, count * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
  std::FILE* file = std::fopen(path, "wb");
  require(file && std::fwrite(host.data(), sizeof(T), count, file) == count, path);
  std::fclose(file);
}
