// A stand-in for CUDA's header of bfloat16: storage and conversion, as the kernels use them.
#pragma once

#include "half_types.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) { return cuda_on_cpu::bfloat16_to_float(x.bits); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {cuda_on_cpu::float_to_bfloat16(x)}; }
