// What the CPU kernels are called with: raw pointers, sizes and strides. Nothing here knows PyTorch.
#pragma once

#include <cstdint>

#include "views.h"

namespace ela {

// A query or key, [B, C] with contiguous channels.
struct RowView {
  void* data;
  int64_t batch;
};

// One column of a [B, G, t] tensor of weights or score gradients: element (b, g) is data[(b * G + g) * stride]. Of a
// sum over maps, one below a `least` above zero leaves its map out: that is not read, or counts as zero whatever it is.
// What is given counts as it is, and what a softmax made as factor_at() has it.
struct ColumnView {
  const void* data;
  int64_t stride;
  double least = 0;
  bool is_given = false;
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
  double tolerance;       // what sums over values leave out; see ColumnView
  bool is_given = false;  // the weights are no softmax's; see ColumnView
};

struct NormParams;

// out[b, c, n] = sum_j column_j[b, g(c)] * source_j[b, c, n]: the forward, and the gather of a value's gradient.
// Where there is a residual it is added, before the one rounding to the type of the map. With a norm the block ends at
// once, a chunk at a time: its `x` is read and its `out` written, and the sum itself only where `out` has an address.
struct AggregateParams {
  Shape shape;
  int64_t sources;
  const MapView* maps;
  const ColumnView* columns;
  MapView out;
  void* workspace;         // aggregate_workspace() accumulation elements
  MapView residual;        // data may be null
  const NormParams* norm;  // its factors prepared; or null
};

// Gradients of one layer. Every output may be null. dvalues[j] = weights_j * dout (the push form). Of a sum by weights
// that are given, `dscores` takes their gradient, and there is nothing behind them.
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

// v = x convolved depthwise with 3x3 taps, padding 1; mean over space of x. Rows of a plane follow each other.
struct DepthwiseParams {
  ImageShape shape;
  MapView x;
  const void* taps;  // [C, 9]
  MapView v;
  void* mean;        // [B, C]
  const void* rows;  // taps as prepare_taps() lays them out, interleaved maps only
  void* workspace;   // depthwise_workspace() accumulation elements
};

// The two filters over the channel axis, odd size, zeros beyond the ends: query and key from the mean over space.
struct ChannelFilterParams {
  Shape shape;
  int64_t size;
  const void* mean;     // [B, C]
  const void *wq, *wk;  // [size]; wq may be null
  void *query, *key;    // [B, C]; query null where wq is
};

// Gradients of them: dmean [B, C] in the accumulation type; dwq and dwk [size] may be null. dquery or dkey may be null.
struct ChannelFilterBackwardParams {
  ChannelFilterParams forward;  // query and key are not read
  const void *dquery, *dkey;    // [B, C]
  void* dmean;
  void *dwq, *dwk;
  void* workspace;  // 2 * B * size accumulation elements
};

// dv gathered as in AggregateParams, a part of it that fits the cache at a time, and convolved at once: never stored.
struct GatherConvolveParams {
  ImageShape shape;
  int64_t heads, sources;
  const MapView* maps;
  const ColumnView* columns;
  MapView x;
  const void* taps;
  const void* rows;   // as in DepthwiseParams
  const void* dmean;  // [B, C] in the accumulation type, or null
  MapView residual;   // added to dx; data may be null
  MapView dx;         // data may be null
  void* dtaps;        // [C, 9] or null
  void* workspace;    // gather_convolve_workspace() accumulation elements
};

// Statistics of a map over batch and space, [C] each: mean and biased variance.
struct StatisticsParams {
  ImageShape shape;
  MapView o;
  void* partials;  // norm_workspace() accumulation elements
  void *mean, *variance;
};

// What a norm keeps of the statistics that it takes: running <- (1 - factor) * running + factor * found, the variance
// unbiased, and one more batch counted.
struct RunningParams {
  void *mean, *variance;  // [C]; null where nothing is kept
  int64_t* batches;       // or null
  double factor;
  bool narrow;  // in the type of the maps, not in the accumulation type
};

// out = x + mask[b] * act(norm(o)), or its backward: then x holds the gradient of out, and out takes that of o, with
// what arrives at o from elsewhere, `also`, added.
// All that belongs to a channel or a sample is in the accumulation type, but for what is narrow.
struct NormParams {
  ImageShape shape;
  MapView o, x, out;
  const void *mean, *variance;  // [C]
  const void *gamma, *beta;     // [C] or null
  const void* mask;             // [B] or null
  double eps;
  bool relu, batch_statistics;
  void *dgamma, *dbeta;  // [C] or null
  bool narrow;           // gamma and beta, and their gradients, in the type of the maps
  void* partials;        // norm_workspace() accumulation elements, the factors at their end
  void* factors;         // [4, C]
  MapView also;          // backward; data may be null
  RunningParams running;
};

// A layer's forward: value, mean, query and key from its input, then attention. `retrieves` false: no query, no
// attention, and where it is a block still, its norm is that of an earlier retrieval.
struct LayerParams {
  bool retrieves;
  DepthwiseParams depthwise;
  ChannelFilterParams filters;
  WeightsParams weights;
  AggregateParams aggregate;
  void* rows;  // 9 * C accumulation elements, interleaved maps only
  bool wants_statistics;
  StatisticsParams statistics;  // of what it retrieves
  bool is_block;
  NormParams norm;  // what follows in a block: with the statistics just taken, or with given ones
};

// A layer's backward: its own attention's (where `attends`), then the gradients of its key, its mean, its input.
struct LayerBackwardParams {
  bool attends;
  BackwardParams attention;
  GatherKeyParams key;                  // dkey.data may be null
  ChannelFilterBackwardParams filters;  // dquery and dkey may be null
  GatherConvolveParams convolve;
  void* rows;  // as in LayerParams
  bool is_block;
  NormParams norm;  // gives the attention its dout
};

// What a value passes before it is gated: nothing, or GELU in its exact form or with a tanh.
enum class Activation : int { kNone = 0, kGelu = 1, kGeluTanh = 2 };
constexpr int kActivations = 3;

// The light form of a layer: out = gate * act(v) + decay * prev, gate = sigmoid(scale * <q, k>) of a head.
struct LightParams {
  ImageShape shape;
  int64_t heads, filter_size;
  double scale;
  Activation act;
  MapView x, v, prev, out;        // the backward reads v, and no out; v is kept as it is before the activation
  bool keeps_v;                   // or v is scratch, of light_values() samples
  const void *wq, *wk, *taps;     // as in ChannelFilterParams and DepthwiseParams
  const void* decay;              // [C]
  void *mean, *query, *key;       // [B, C]
  void* factors;                  // [2, B, C] in the accumulation type: gate and decay by channel
  void *mean_out, *variance_out;  // statistics of out, [C], or null
  void* workspace;                // light_workspace() accumulation elements
  bool is_block;                  // as in LayerParams and LayerBackwardParams
  NormParams norm;
};

// Its gradients; each may be left out. `dx_residual` is added to dx. `dv` takes the gradient of v where that passes an
// activation; without one it is never stored.
struct LightBackwardParams {
  LightParams forward;
  MapView dout, dx_residual, dx, dprev, dv;
  void *dwq, *dwk, *dtaps, *ddecay;
};

// Attention over depth at every position: scores <u, key> of T keys, u = row, or row * query where that is a map.
struct PositionParams {
  Shape shape;  // one head
  int64_t depth, prev_depth;
  bool normed;  // the keys are divided by their root mean square over the channels
  double eps;
  const void* row;  // [C] in the accumulation type
  MapView query;    // data may be null
  const MapView* values;
  const MapView* keys;  // null: the values
  const void* prev;     // [B, prev_depth, N] or null
  void* weights;        // [B, depth, N]; the backward reads them
};

struct PositionForwardParams {
  PositionParams call;
  MapView out;
  void* kl;  // [B, N] or null
};

// Every gradient may be left out: `dvalues` and `dkeys` may be null, and so may the data of each.
struct PositionBackwardParams {
  PositionParams call;
  const MapView* dout;   // null: no gradient arrived through `out`
  const void* dweights;  // [B, depth, N] or null
  const void* dkl;       // [B, N] or null
  void* coefficients;    // [3, B, depth, N]: alpha and beta of a key's gradient, and what is worked in; always written
  bool needs_maps;       // whether any of the following but dprev is wanted
  void* drow;            // [C]
  MapView dquery;
  void* dprev;  // like prev
  const MapView *dvalues, *dkeys;
  void* workspace;  // position_workspace() accumulation elements
};

// What one layer left to those that it retrieved from; the planes are those of one depth, `batch` elements apart.
struct PositionSource {
  MapView dout;  // data may be null
  const void *weights, *alpha, *beta;
  int64_t batch;
  const void* row;
  MapView query;  // data may be null
};

struct PositionGatherParams {
  Shape shape;
  MapView value, dvalue;
  const PositionSource* sources;
  int64_t count;
};

// One instruction set's kernels, each by dtype, or where they know values of a history, by ValueType.
struct Kernels {
  const char* name;
  void (*weights[kDTypes])(const WeightsParams&, int threads);
  void (*aggregate[kValueTypes])(const AggregateParams&, int threads);
  void (*backward[kValueTypes])(const BackwardParams&, int threads);
  void (*mix_backward[kDTypes])(const BackwardParams&, int threads);
  void (*gather_key[kDTypes])(const GatherKeyParams&, int threads);
  void (*layer[kValueTypes])(const LayerParams&, int threads);
  void (*layer_backward[kValueTypes])(const LayerBackwardParams&, int threads);
  void (*norm_forward[kDTypes])(const NormParams&, int threads);
  void (*norm_backward[kDTypes])(const NormParams&, int threads);
  void (*light_layer[kDTypes])(const LightParams&, int threads);
  void (*light_layer_backward[kDTypes])(const LightBackwardParams&, int threads);
  void (*position_forward[kDTypes])(const PositionForwardParams&, int threads);
  void (*position_backward[kDTypes])(const PositionBackwardParams&, int threads);
  void (*position_gather[kDTypes])(const PositionGatherParams&, int threads);
  int64_t (*aggregate_workspace)(const Shape&, int64_t sources);
  int64_t (*backward_workspace)(const Shape&, int64_t depth);
  int64_t (*depthwise_workspace)(const ImageShape&);
  int64_t (*norm_workspace)(const ImageShape&);
  int64_t (*gather_convolve_workspace)(const ImageShape&, int64_t sources, int threads);
  int64_t (*light_workspace)(const ImageShape&, int64_t filter_size, int threads);
  int64_t (*light_values)(const ImageShape&, int threads);
  int64_t (*position_workspace)(const Shape&);
};

extern const Kernels kKernelsBaseline;
#ifdef ELA_X86_SIMD
extern const Kernels kKernelsAvx2;
extern const Kernels kKernelsAvx512;
#ifdef ELA_X86_BF16
extern const Kernels kKernelsAvx512Bf16;
#endif
#endif

// The kernels in use: the widest that this processor runs, or what ELA_KERNELS_SIMD names.
const Kernels& kernels();

}  // namespace ela
