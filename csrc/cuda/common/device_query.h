// What the CUDA runtime knows of the devices. No CUDA header is needed to call it, so that the
// binding is compiled by the host compiler alone. Every function returns a CUDA error code, 0 for
// success.
#pragma once

#include <cstddef>

namespace ela::cuda {

constexpr int kMaxNameLength = 256;

struct DeviceProperties {
  char name[kMaxNameLength];
  int capability_major;
  int capability_minor;
  int multiprocessors;
  std::size_t total_memory;  // bytes
};

int count_devices(int* count);
int query_device(int device, DeviceProperties* properties);

// Launches a one-thread kernel that writes `value + 1` on the device and brings it back: the whole
// path from the launch to the copy works if `*result == value + 1` afterwards.
int launch_increment(int device, int value, int* result);

int runtime_version();
const char* error_name(int code);
const char* error_text(int code);

}  // namespace ela::cuda
