// What the kernels of the attention over layers are called with; see common/call.h.
#pragma once

#include <cstdint>

#include "cuda/common/call.h"

namespace ela::cuda {

// Queries or keys [B, C] with contiguous channels and one batch stride.
struct RowList {
  const void* const* data;
  int64_t count, batch;
};

// Columns of [B, G, t] float32 tensors: element (b, g) of column m is data[m][(b * G + g) * strides[m]].
struct ColumnList {
  const void* const* data;
  const int64_t* strides;
  int64_t count;
};

struct WeightsCall {
  Shape shape;
  float scale;
  const void* query;
  int64_t query_batch;
  RowList keys;
  const float* prev;  // [B, G, prev_depth] or null
  int64_t prev_depth;
  float* weights;         // [B, G, depth]
  float* kl;              // [B, G]; null without prev
  float tolerance;        // values of a smaller weight are left out
  bool is_given = false;  // the weights are no softmax's, and have neither query nor keys
};

struct ForwardCall {
  WeightsCall attention;
  MapList values;
  MapView out;
};

// Every gradient but dscores may be null. dvalues.data[j] = weights_j * dout (the push form).
struct BackwardCall {
  WeightsCall attention;  // `weights` is read here, `kl` unused
  MapList values;
  MapView dout;           // data null: no gradient arrived through `out`, and no value is read
  const float* dweights;  // [B, G, depth] or null
  const float* dkl;       // [B, G] or null
  float* dscores;         // [B, G, depth], of the dot products before the scale, or of weights that are given
  void* dquery;           // [B, C]
  RowList dkeys;          // count 0 or depth; single ones may be null
  float* dprev;           // [B, G, prev_depth]
  MapList dvalues;        // count 0 or depth; single ones may be null
  float* workspace;       // backward_workspace() elements
};

// The pull form: dkey = sum_m dscores_m * query_m and dvalue = sum_m weights_m * dout_m; null leaves one out.
struct GatherCall {
  Shape shape;
  RowList queries;
  ColumnList dscores;
  void* dkey;  // [B, C]
  MapList douts;
  ColumnList weights;
  const float* tolerances;  // one for each dout, which is left out where its weight is smaller
  MapView dvalue;
};

// The kernels of one dtype.
struct Kernels {
  int (*weights)(const Target&, const WeightsCall&);
  int (*forward)(const Target&, const ForwardCall&);
  int (*backward)(const Target&, const BackwardCall&);
  int (*gather)(const Target&, const GatherCall&);
};

extern const Kernels kFloat32Kernels;
extern const Kernels kBFloat16Kernels;
extern const Kernels kFloat16Kernels;

// Null for a dtype that no CUDA kernel serves.
inline const Kernels* kernels_for(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return &kFloat32Kernels;
    case DType::kBFloat16:
      return &kBFloat16Kernels;
    case DType::kFloat16:
      return &kFloat16Kernels;
    default:
      return nullptr;
  }
}

}  // namespace ela::cuda
