#include <cuda_runtime.h>

#include <cstring>

#include "cuda/common/device_query.h"

namespace ela::cuda {

namespace {

__global__ void increment_kernel(int value, int* result_ptr) { *result_ptr = value + 1; }

// The runtime keeps a failure for the next caller to find, who would take it for their own.
int clear_last_error(cudaError_t code) {
  if (code != cudaSuccess) cudaGetLastError();
  return static_cast<int>(code);
}

cudaError_t increment_on_device(int value, int* result) {
  int* result_ptr = nullptr;
  cudaError_t code = cudaMalloc(&result_ptr, sizeof(int));
  if (code != cudaSuccess) return code;
  increment_kernel<<<1, 1>>>(value, result_ptr);
  code = cudaGetLastError();
  if (code == cudaSuccess) {
    code = cudaMemcpy(result, result_ptr, sizeof(int), cudaMemcpyDeviceToHost);
  }
  const cudaError_t freed = cudaFree(result_ptr);
  return code != cudaSuccess ? code : freed;
}

}  // namespace

int count_devices(int* count) {
  *count = 0;
  return clear_last_error(cudaGetDeviceCount(count));
}

int query_device(int device, DeviceProperties* properties) {
  cudaDeviceProp found;
  const cudaError_t code = cudaGetDeviceProperties(&found, device);
  if (code != cudaSuccess) return clear_last_error(code);
  std::strncpy(properties->name, found.name, kMaxNameLength - 1);
  properties->name[kMaxNameLength - 1] = '\0';
  properties->capability_major = found.major;
  properties->capability_minor = found.minor;
  properties->multiprocessors = found.multiProcessorCount;
  properties->total_memory = found.totalGlobalMem;
  return 0;
}

int launch_increment(int device, int value, int* result) {
  int previous = 0;
  cudaError_t code = cudaGetDevice(&previous);
  if (code != cudaSuccess) return clear_last_error(code);
  code = cudaSetDevice(device);
  if (code != cudaSuccess) return clear_last_error(code);
  code = increment_on_device(value, result);
  const cudaError_t restored = cudaSetDevice(previous);
  return clear_last_error(code != cudaSuccess ? code : restored);
}

int runtime_version() {
  int version = 0;
  clear_last_error(cudaRuntimeGetVersion(&version));
  return version;
}

const char* error_name(int code) { return cudaGetErrorName(static_cast<cudaError_t>(code)); }

const char* error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace ela::cuda
