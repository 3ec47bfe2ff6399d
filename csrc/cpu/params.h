// What the CPU kernels are called with: raw pointers, sizes and strides. Nothing here knows PyTorch.
#pragma once

#include <cstdint>

namespace ela {

enum class DType : int { kFloat64 = 0, kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3 };
constexpr int kDTypes = 4;

// B x C x N elements. Planar: the N positions of a channel are contiguous. Interleaved: the C channels of a
// position are. All strides are in elements.
struct Shape {
  int64_t batch, channels, heads, positions;
  bool interleaved;
  int64_t head_dim() const { return channels / heads; }
};

// A feature map; `inner` is the channel stride (planar) or the position stride (interleaved).
struct MapView {
  void* data;
  int64_t batch, inner;
};

// A query or key, [B, C] with contiguous channels.
struct RowView {
  void* data;
  int64_t batch;
};

// One column of a [B, G, t] tensor of weights or score gradients: element (b, g) is data[(b * G + g) * stride].
struct ColumnView {
  const void* data;
  int64_t stride;
};

// scores -> softmax -> divergence. `prev` is [B, G, prev_depth] or null; `kl` is [B, G] or null.
struct WeightsParams {
  Shape shape;
  int64_t depth, prev_depth;
  double scale;
  RowView query;
  const RowView* keys;
  const void* prev;
  void* weights;  // [B, G, depth]
  void* kl;
};

// out[b, c, n] = sum_j column_j[b, g(c)] * source_j[b, c, n]: the forward, and the gather of a value's gradient.
struct AggregateParams {
  Shape shape;
  int64_t sources;
  const MapView* maps;
  const ColumnView* columns;
  MapView out;
  void* workspace;  // aggregate_workspace() accumulation elements
};

// Gradients of one layer. Every output may be null. dvalues[j] = weights_j * dout (the push form).
struct BackwardParams {
  WeightsParams forward;  // `weights` is read here, `kl` unused
  const MapView* values;
  const MapView* dout;   // null: no gradient arrived through `out`
  const void* dweights;  // [B, G, depth] or null
  const void* dkl;       // [B, G] or null
  void* dscores;         // [B, G, depth], of the dot products before the scale; always written
  RowView dquery;
  const RowView* dkeys;    // depth rows or null
  void* dprev;             // [B, G, prev_depth] or null
  const MapView* dvalues;  // depth maps or null; single ones may be null too
  void* workspace;         // backward_workspace() accumulation elements
};

// dkey[b, c] = sum_m column_m[b, g(c)] * query_m[b, c]: the gather of a key's gradient.
struct GatherKeyParams {
  Shape shape;
  int64_t sources;
  const RowView* queries;
  const ColumnView* columns;
  RowView dkey;
};

// One instruction set's kernels, each by dtype.
struct Kernels {
  const char* name;
  void (*weights[kDTypes])(const WeightsParams&, int threads);
  void (*aggregate[kDTypes])(const AggregateParams&, int threads);
  void (*backward[kDTypes])(const BackwardParams&, int threads);
  void (*gather_key[kDTypes])(const GatherKeyParams&, int threads);
  int64_t (*aggregate_workspace)(const Shape&, int64_t sources);
  int64_t (*backward_workspace)(const Shape&, int64_t depth);
};

extern const Kernels kKernelsBaseline;
#ifdef ELA_X86_SIMD
extern const Kernels kKernelsAvx2;
extern const Kernels kKernelsAvx512;
#endif

// The kernels in use: the widest that this processor runs, or what ELA_KERNELS_SIMD names.
const Kernels& kernels();

}  // namespace ela
