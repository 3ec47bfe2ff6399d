// What csrc/cuda/common/device_query.cu offers, without a device: its launch with <<<>>> is no C++.
#include "cuda/common/device_query.h"

#include "cuda_runtime.h"

namespace ela::cuda {

int count_devices(int* count) {
  *count = 0;
  return 0;
}

int query_device(int, DeviceProperties*) { return cudaErrorInvalidDevice; }

int launch_increment(int, int, int*) { return cudaErrorInvalidDevice; }

int runtime_version() { return CUDART_VERSION; }

const char* error_name(int code) { return cudaGetErrorName(static_cast<cudaError_t>(code)); }

const char* error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace ela::cuda
