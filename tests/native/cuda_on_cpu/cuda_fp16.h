// A stand-in for CUDA's header of float16: storage and conversion, as the kernels use them.
#pragma once

#include "half_types.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) { return cuda_on_cpu::half_to_float(x.bits); }
inline __half __float2half_rn(float x) { return {cuda_on_cpu::float_to_half(x)}; }
