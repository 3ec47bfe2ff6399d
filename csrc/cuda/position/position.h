// What the kernels of attention over depth at every position are called with; see common/call.h.
#pragma once

#include <cstdint>

#include "cuda/common/call.h"

namespace ela::cuda {

// score_t = r_t * <row * query, key_t> at every position, r_t the inverse root mean square of the key, or 1.
struct PositionCall {
  Shape shape;  // of one head
  bool normed;
  float eps;
  const float* row;  // [C]
  MapView query;     // data null: `row` holds all of it
  MapList values;
  MapList keys;       // count 0: each value is its own key
  const float* prev;  // [B, prev_depth, N] or null
  int64_t prev_depth;
  float* weights;  // [B, depth, N]
};

struct PositionForwardCall {
  PositionCall call;
  MapView out;
  float* kl;  // [B, N]; null without prev
};

// What has no address is not there, or not wanted.
struct PositionBackwardCall {
  PositionCall call;  // `weights` is read here
  MapView dout;
  const float* dweights;  // [B, depth, N]
  const float* dkl;       // [B, N]
  float* planes;          // [3, B, depth, N]: alpha, beta, and what is worked in
  float* row_parts;       // [position_parts(), C], of which `parts` are written; their sum is the gradient of the row
  MapView dquery;
  float* dprev;     // [B, prev_depth, N]
  MapList dvalues;  // count 0 or depth; single ones may be null
  MapList dkeys;    // the same
};

// The pull form: dvalue = sum_m w_m dout_m + alpha_m row_m query_m - beta_m value, over the layers that retrieved it.
struct PositionGatherCall {
  Shape shape;
  MapView value, dvalue;
  MapList douts, queries;  // of each layer; single ones may be null
  // Of each layer: where its planes [B, depth_m, N] of this value begin, in the first sample, its row, and how far a
  // sample's planes lie apart.
  const void* const* weights;
  const void* const* alphas;
  const void* const* betas;
  const void* const* rows;
  const int64_t* batches;
  // Float32 [B, C, N] in the form of the value: what earlier calls summed, and where this one leaves its sum in place
  // of `dvalue`. Either may be null.
  const float* carried;
  float* carry;
};

// The kernels of one dtype.
struct PositionKernels {
  int (*forward)(const Target&, const PositionForwardCall&);
  int (*backward)(const Target&, const PositionBackwardCall&, int64_t* parts);
  int (*gather)(const Target&, const PositionGatherCall&);
};

extern const PositionKernels kFloat32PositionKernels;
extern const PositionKernels kBFloat16PositionKernels;
extern const PositionKernels kFloat16PositionKernels;

// Null for a dtype that no CUDA kernel serves.
inline const PositionKernels* position_kernels_for(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return &kFloat32PositionKernels;
    case DType::kBFloat16:
      return &kBFloat16PositionKernels;
    case DType::kFloat16:
      return &kFloat16PositionKernels;
    default:
      return nullptr;
  }
}

}  // namespace ela::cuda
