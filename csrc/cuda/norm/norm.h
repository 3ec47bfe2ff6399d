// What the kernels of a residual block's end are called with: out = x + mask * act(norm(o)), and its backward; see
// common/call.h. `shape.heads` counts for nothing.
#pragma once

#include "cuda/common/call.h"
#include "cuda/common/channel_plan.h"
#include "cuda/common/parameter.h"

namespace ela::cuda {

// Mean and biased variance of each channel, [2, C], from its partial moments.
struct StatisticsCall {
  Shape shape;
  Parts parts;
  const float* moments;  // see AttendCall
  float* statistics;
};

struct NormCall {
  Shape shape;
  const float* statistics;  // [2, C]
  Parameter gamma, beta;    // [C] or absent
  Parameter mask;           // [B] or absent: a factor for each sample
  float eps;
  bool relu;
};

struct NormForwardCall {
  NormCall norm;
  MapView o, x, out;
};

struct NormBackwardCall {
  NormCall norm;
  MapView o, dout;
  MapView also;      // what is added to the gradient of o; data may be null
  MapView gradient;  // of o
  void* dgamma;      // [C], as gamma; null where gamma is absent
  void* dbeta;       // [C], as beta; null where beta is absent
  float* partial;    // norm_partials() floats; null where there are neither parameters nor `moved`
  float* moved;      // [2, C], to work in: the statistics are those of the batch, and move with o. Null: they are given
};

int norm_statistics(const Target& target, const StatisticsCall& call);

struct NormKernels {
  int (*forward)(const Target&, const NormForwardCall&);
  int (*backward)(const Target&, const NormBackwardCall&);
};

extern const NormKernels kFloat32NormKernels;
extern const NormKernels kBFloat16NormKernels;
extern const NormKernels kFloat16NormKernels;

// Null for a dtype that no CUDA kernel serves.
inline const NormKernels* norm_kernels_for(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return &kFloat32NormKernels;
    case DType::kBFloat16:
      return &kBFloat16NormKernels;
    case DType::kFloat16:
      return &kFloat16NormKernels;
    default:
      return nullptr;
  }
}

// Partial sums are two floats for each part of a channel; a part is then large enough for them to be a hundredth of the
// two maps that are read, where that leaves blocks enough.
inline Grid plan_norm(const Shape& shape, int64_t vec, int64_t element_size) {
  Shape s = shape;
  s.heads = s.channels;
  static_assert(kDotsUnroll<4> == kDotsUnroll<8>, "one number for every vector");
  const int unroll = vec == 1 ? kDotsUnroll<1> : kDotsUnroll<4>;
  if (!s.interleaved) return plan_planar(s, false, vec, unroll, false);
  const int64_t wanted = kPartialShare * 8 / (2 * element_size);
  return plan_interleaved(s, vec, unroll, 1, 0, [](int64_t) { return 0; }, wanted);
}

// Floats that hold the partial sums of a call whatever its alignment, which a caller need not know.
inline int64_t norm_partials(const Shape& s, int64_t element_size) {
  int64_t most = 0;
  for (const int64_t vec : {16 / element_size, int64_t{1}}) {
    const int64_t count = parts_count(s, parts_of(plan_norm(s, vec, element_size), vec));
    if (count > most) most = count;
  }
  return most;
}

}  // namespace ela::cuda
