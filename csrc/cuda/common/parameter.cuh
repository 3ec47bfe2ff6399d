// Elements of a parameter as float32. The dtype is the same for every thread, so the branch costs next to nothing.
#pragma once

#include "cuda/common/device.cuh"
#include "cuda/common/parameter.h"

namespace ela::cuda {

template <class T>
constexpr DType kDType = DType::kFloat32;
template <>
constexpr DType kDType<__nv_bfloat16> = DType::kBFloat16;
template <>
constexpr DType kDType<__half> = DType::kFloat16;

__device__ inline float load_parameter(const Parameter& p, int64_t i) {
  switch (p.dtype) {
    case DType::kBFloat16:
      return load_scalar(static_cast<const __nv_bfloat16*>(p.data) + i);
    case DType::kFloat16:
      return load_scalar(static_cast<const __half*>(p.data) + i);
    default:
      return load_scalar(static_cast<const float*>(p.data) + i);
  }
}

// Writes an element of what has a parameter's dtype.
__device__ inline void store_parameter(void* data, DType dtype, int64_t i, float x) {
  switch (dtype) {
    case DType::kBFloat16:
      static_cast<__nv_bfloat16*>(data)[i] = from_float<__nv_bfloat16>(x);
      break;
    case DType::kFloat16:
      static_cast<__half*>(data)[i] = from_float<__half>(x);
      break;
    default:
      static_cast<float*>(data)[i] = x;
  }
}

}  // namespace ela::cuda
