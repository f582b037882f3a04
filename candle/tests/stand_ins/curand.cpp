// The part of cuRAND that candle calls: numbers from the host, by way of the driver.
#include <cuda.h>

#include <random>
#include <vector>

namespace {

enum Status { SUCCESS = 0, LAUNCH_FAILURE = 201 };

struct Generator {
  std::mt19937_64 engine;
  CUstream stream;
};

template <typename T, typename Distribution>
int fill(Generator* generator, CUdeviceptr to, size_t count, Distribution distribution) {
  std::vector<T> numbers(count);
  for (T& number : numbers) number = distribution(generator->engine);
  CUresult code = cuMemcpyHtoDAsync(to, numbers.data(), count * sizeof(T), generator->stream);
  if (!code) code = cuStreamSynchronize(generator->stream);
  return code ? LAUNCH_FAILURE : SUCCESS;
}

}  // namespace

extern "C" {

int curandCreateGenerator(Generator** generator, int /*kind*/) {
  *generator = new Generator{};
  return SUCCESS;
}

int curandDestroyGenerator(Generator* generator) {
  delete generator;
  return SUCCESS;
}

int curandSetStream(Generator* generator, CUstream stream) {
  generator->stream = stream;
  return SUCCESS;
}

int curandSetPseudoRandomGeneratorSeed(Generator* generator, unsigned long long seed) {
  generator->engine.seed(seed);
  return SUCCESS;
}

int curandGenerateUniform(Generator* generator, CUdeviceptr to, size_t count) {
  return fill<float>(generator, to, count, std::uniform_real_distribution<float>());
}

int curandGenerateUniformDouble(Generator* generator, CUdeviceptr to, size_t count) {
  return fill<double>(generator, to, count, std::uniform_real_distribution<double>());
}

int curandGenerateNormal(Generator* generator, CUdeviceptr to, size_t count, float mean, float std) {
  return fill<float>(generator, to, count, std::normal_distribution<float>(mean, std));
}

int curandGenerateNormalDouble(Generator* generator, CUdeviceptr to, size_t count, double mean,
                               double std) {
  return fill<double>(generator, to, count, std::normal_distribution<double>(mean, std));
}

}  // extern "C"
