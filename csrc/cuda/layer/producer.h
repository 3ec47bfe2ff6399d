// What the CUDA kernels that make a layer's value and the sums of its mean from a feature map are called with, and
// those of their backward; see common/call.h.
#pragma once

#include "cuda/common/call.h"
#include "cuda/common/parameter.h"

namespace ela::cuda {

// v = depthwise 3x3 convolution of x (padding 1) and the sums over space of x, in one read of it.
struct ProducerCall {
  ImageShape shape;
  MapView x;
  Parameter wv;  // [C, 3, 3]
  MapView v;
  float* sums;  // [B, groups, C], see producer_groups()
};

// What value, query and key send back to x and to the filters. Gradients that arrive may be null, and every output too;
// those of a filter need the gradient that reaches them, and have its dtype.
struct ProducerBackwardCall {
  ImageShape shape;
  int64_t filter_size;
  MapView dv, x, residual;    // residual: added to dx
  Parameter wv;               // [C, 3, 3]
  const void *dquery, *dkey;  // [B, C]
  Parameter wq, wk;           // [filter_size]; wq only with dquery
  const void* mean;           // [B, C]
  MapView dx;
  void *dwv, *dwq, *dwk;  // as the filters
  float* workspace;       // producer_workspace() elements
};

// The kernels of one dtype.
struct ProducerKernels {
  int (*forward)(const Target&, const ProducerCall&);
  int (*backward)(const Target&, const ProducerBackwardCall&);
};

extern const ProducerKernels kFloat32ProducerKernels;
extern const ProducerKernels kBFloat16ProducerKernels;
extern const ProducerKernels kFloat16ProducerKernels;

// Null for a dtype that no CUDA kernel serves.
inline const ProducerKernels* producer_kernels_for(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return &kFloat32ProducerKernels;
    case DType::kBFloat16:
      return &kBFloat16ProducerKernels;
    case DType::kFloat16:
      return &kFloat16ProducerKernels;
    default:
      return nullptr;
  }
}

}  // namespace ela::cuda
