// The host's side of every launch: the device guard, the grid, and the error code.
#pragma once

#include "cuda/common/call.h"
#include "cuda/common/device.cuh"
#include "cuda/common/plan.h"

namespace ela::cuda {

// Makes a device the current one, and the one before it again at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    code_ = cudaGetDevice(&previous_);
    if (code_ != cudaSuccess || previous_ == device) return;
    code_ = cudaSetDevice(device);
    changed_ = code_ == cudaSuccess;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t code() const { return code_; }

 private:
  cudaError_t code_ = cudaSuccess;
  int previous_ = 0;
  bool changed_ = false;
};

// Launches `kernel(params)` with a block for each of `items`, or as many as a grid can have: the kernels walk on from
// there.
template <class Params>
cudaError_t launch(void (*kernel)(Params), const Params& params, int64_t items, int64_t shared_bytes, void* stream) {
  void* arguments[] = {const_cast<Params*>(&params)};
  const dim3 grid(static_cast<unsigned>(smaller<int64_t>(items, kMaxGrid)));
  return cudaLaunchKernel(kernel, grid, dim3(kBlock), arguments, static_cast<size_t>(shared_bytes),
                          static_cast<cudaStream_t>(stream));
}

// The runtime keeps a failure for the next caller to find, who would take it for their own.
inline int finish(cudaError_t code) {
  if (code != cudaSuccess) cudaGetLastError();
  return static_cast<int>(code);
}

// What the addresses and strides of a call allow. Every map of the call is shown to it. A stride that no address is
// computed with, because there is one sample or one row, does not count.
class Alignment {
 public:
  Alignment(const Shape& s, int64_t vec) : shape_(s), vec_(vec) {}

  void see(const void* data, int64_t batch, int64_t inner) {
    if (data == nullptr) return;
    const bool one_row = (shape_.interleaved ? shape_.positions : shape_.channels) == 1;
    gapless_ = gapless_ && (one_row || inner == shape_.positions);
    samples_fit_ = samples_fit_ && reinterpret_cast<uintptr_t>(data) % 16 == 0;
    samples_fit_ = samples_fit_ && (shape_.batch == 1 || batch % vec_ == 0);
    rows_fit_ = rows_fit_ && (one_row || inner % vec_ == 0);
  }
  void see(const MapList& maps) {
    for (int64_t i = 0; i < maps.count; ++i) see(maps.data[i], maps.batch, maps.inner);
  }

  // Planar: the channels of a head follow each other without gaps in every map.
  bool gapless() const { return !shape_.interleaved && gapless_; }
  // Every row can be read in vectors of 16 bytes.
  bool vectors() const {
    if (shape_.interleaved) return samples_fit_ && rows_fit_ && shape_.channels % vec_ == 0;
    if (gapless()) return samples_fit_ && shape_.head_dim() * shape_.positions % vec_ == 0;
    return samples_fit_ && rows_fit_ && shape_.positions % vec_ == 0;
  }

 private:
  Shape shape_;
  int64_t vec_;
  bool gapless_ = true, samples_fit_ = true, rows_fit_ = true;
};

}  // namespace ela::cuda
