// What the kernels that make a layer's query and key are called with: alone, or in the launch of its attention; see
// common/call.h.
#pragma once

#include "cuda/attention/attention.h"
#include "cuda/common/channel_plan.h"
#include "cuda/common/parameter.h"

namespace ela::cuda {

// mean = sums over the groups / positions, rounded as it is stored; query and key are that mean filtered along the
// channels, with zeros beyond the first and the last.
struct RowsCall {
  Shape shape;
  const float* sums;  // [B, groups, C]
  int64_t groups;
  Parameter query_filter;  // [size]; absent where no query is wanted
  Parameter key_filter;    // [size]
  int64_t size;
  void* mean;   // [B, C], as the maps
  void* query;  // [B, C] or null
  void* key;    // [B, C]
};

// An attention whose query, and whose own key, are the rows: `forward.attention` names them too, the key last.
struct AttendCall {
  RowsCall rows;
  ForwardCall forward;
  bool has_residual;  // the last of forward.values is a map to be added, with no key
  float* moments;     // partial means of `out`, as it is rounded, then sums of squared distances from them; see Parts
};

struct RowsKernels {
  int (*rows)(const Target&, const RowsCall&);
  // `parts`: how the moments are cut; written where they are.
  int (*attend)(const Target&, const AttendCall&, Parts* parts);
};

extern const RowsKernels kFloat32RowsKernels;
extern const RowsKernels kBFloat16RowsKernels;
extern const RowsKernels kFloat16RowsKernels;

// Null for a dtype that no CUDA kernel serves.
inline const RowsKernels* rows_kernels_for(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return &kFloat32RowsKernels;
    case DType::kBFloat16:
      return &kBFloat16RowsKernels;
    case DType::kFloat16:
      return &kFloat16RowsKernels;
    default:
      return nullptr;
  }
}

}  // namespace ela::cuda
