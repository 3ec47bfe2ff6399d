// Views of what Python passes as addresses and strides; shared by the bindings of the CPU kernels.
#pragma once

#include <array>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "binding/named.h"
#include "cpu/select.h"

namespace ela::binding {

using Ints = std::vector<int64_t>;
using View = std::array<int64_t, 3>;  // address, batch stride, inner stride; address 0 = absent

inline void* address(int64_t x) { return reinterpret_cast<void*>(static_cast<uintptr_t>(x)); }

inline MapView map(const View& view) { return {address(view[0]), view[1], view[2]}; }

inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

// Refuses an address of 0 where a kernel would read or write `elements` of them. What may be left out is not asked.
inline void present(int64_t address, int64_t elements, const char* name) {
  if (address == 0 && elements != 0) throw std::invalid_argument(std::string(name) + ": no address");
}
inline void present(const Ints& addresses, int64_t elements, const char* name) {
  for (const int64_t x : addresses) present(x, elements, name);
}

inline int64_t rows_of(const Shape& s) { return s.batch * s.channels; }
inline int64_t elements_of(const Shape& s) { return s.batch * s.channels * s.positions; }

// Addresses and strides of some tensors; `strides` has one set for each address, or one for all.
inline std::vector<MapView> maps(const Ints& addresses, const Ints& strides) {
  const size_t step = strides.size() == 2 ? 0 : 2;
  require(strides.size() == (step == 0 ? 2 : 2 * addresses.size()) || addresses.empty(), "strides: two for each map");
  std::vector<MapView> out;
  out.reserve(addresses.size());
  for (size_t i = 0; i < addresses.size(); ++i) {
    out.push_back({address(addresses[i]), strides[i * step], strides[i * step + 1]});
  }
  return out;
}

inline std::vector<RowView> rows(const Ints& addresses, const Ints& strides) {
  const size_t step = strides.size() == 1 ? 0 : 1;
  require(strides.size() == (step == 0 ? 1 : addresses.size()) || addresses.empty(), "strides: one for each tensor");
  std::vector<RowView> out;
  out.reserve(addresses.size());
  for (size_t i = 0; i < addresses.size(); ++i) out.push_back({address(addresses[i]), strides[i * step]});
  return out;
}

// What the backward of one later layer left: query, score gradients [B, G, depth], the gradient of its output (data 0
// where there is none) and its weights [B, G, depth]. Python keeps it as bytes, and gives those of many layers at once.
struct Source {
  int64_t query, query_stride, scores, depth;
  View dout;
  int64_t weights;
  double tolerance;
};

// The same for the kernels, which want one column of the scores and weights.
struct SourceViews {
  std::vector<RowView> queries;
  std::vector<ColumnView> scores;
  std::vector<MapView> douts;
  std::vector<ColumnView> weights;
};

inline SourceViews source_views(const pybind11::bytes& sources, int64_t index, size_t size, const Shape& shape) {
  const std::string_view packed = sources;
  require(packed.size() % sizeof(Source) == 0, "sources: each as source() gives it");
  const size_t count = packed.size() / sizeof(Source);
  SourceViews views;
  views.queries.reserve(count + 1), views.scores.reserve(count + 1);
  views.douts.reserve(count + 1), views.weights.reserve(count + 1);
  for (size_t i = 0; i < count; ++i) {
    Source s;
    std::memcpy(&s, packed.data() + i * sizeof(Source), sizeof(Source));
    require(index >= 0 && index < s.depth, "index: must be of a layer that each source retrieved");
    present(s.query, shape.batch, "query of a source"), present(s.scores, shape.batch, "scores of a source");
    present(s.weights, s.dout[0] == 0 ? 0 : shape.batch, "weights of a source");
    const int64_t column = index * static_cast<int64_t>(size);
    views.queries.push_back({address(s.query), s.query_stride});
    views.scores.push_back({static_cast<char*>(address(s.scores)) + column, s.depth});
    if (s.dout[0] == 0) continue;
    views.douts.push_back(map(s.dout));
    views.weights.push_back({static_cast<char*>(address(s.weights)) + column, s.depth, s.tolerance});
  }
  return views;
}

// B, C, G, N, interleaved
inline Shape shape_of(const std::array<int64_t, 5>& s) {
  if (s[0] < 0 || s[3] < 0 || s[2] < 1 || s[1] < s[2] || s[1] % s[2] != 0) {
    throw std::invalid_argument("shape: heads must divide channels, sizes must not be negative");
  }
  return {s[0], s[1], s[2], s[3], s[4] != 0};
}

// B, C, H, W, interleaved
inline ImageShape image_shape_of(const std::array<int64_t, 5>& s) {
  require(s[0] >= 0 && s[1] >= 0 && s[2] >= 0 && s[3] >= 0, "shape: sizes must not be negative");
  return {s[0], s[1], s[2], s[3], s[4] != 0};
}

inline int checked_dtype(int dtype) {
  if (dtype < 0 || dtype >= ela::kDTypes) throw std::invalid_argument("dtype: unknown code");
  return dtype;
}

inline int checked_value_type(int code) {
  if (code < 0 || code >= ela::kValueTypes) throw std::invalid_argument("value_type: unknown code");
  return code;
}

// Of an accumulation element.
inline size_t element_size(int dtype) { return dtype == static_cast<int>(ela::DType::kFloat64) ? 8 : 4; }

// One layer's attention. `prev` may be left out, with a depth of 0.
struct Attention {
  double scale;
  int64_t query, query_stride;
  Ints keys, key_strides, values, value_strides;
  int64_t prev, prev_depth, weights;
  double tolerance;

  template <class Visit>
  void fields(Visit visit) {
    visit("scale", scale), visit("query", query), visit("query_stride", query_stride);
    visit("keys", keys), visit("key_strides", key_strides);
    visit("values", values), visit("value_strides", value_strides);
    visit("prev", prev), visit("prev_depth", prev_depth), visit("weights", weights), visit("tolerance", tolerance);
  }
};

// `kl` may be left out.
inline WeightsParams weights_params(const Shape& shape, const Attention& a, const std::vector<RowView>& keys,
                                    int64_t kl) {
  const int64_t depth = static_cast<int64_t>(keys.size());
  require(depth >= 1 && (a.prev == 0 || (a.prev_depth >= 1 && a.prev_depth <= depth)),
          "depth: previous weights too long");
  present(a.query, shape.batch, "query"), present(a.weights, shape.batch, "weights");
  present(a.prev, shape.batch * a.prev_depth, "previous weights"), present(a.keys, shape.batch, "keys");
  return {shape,
          depth,
          a.prev == 0 ? 0 : a.prev_depth,
          a.scale,
          {address(a.query), a.query_stride},
          keys.data(),
          address(a.prev),
          address(a.weights),
          a.prev == 0 ? nullptr : address(kl),
          a.tolerance};
}

inline RowView row(int64_t data, int64_t stride) { return {address(data), stride}; }

// Memory for one call, handed out in parts. Not a tensor, which takes longer to make than the work on a small map.
class Scratch {
 public:
  explicit Scratch(int64_t bytes)
      : memory_(static_cast<char*>(::operator new(static_cast<size_t>(bytes) + kAlign, std::align_val_t(kAlign)))),
        next_(memory_.get()) {}
  void* take(int64_t bytes) {
    char* taken = next_;
    next_ += bytes;
    return taken;
  }

 private:
  static constexpr size_t kAlign = 64;
  struct Free {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t(kAlign)); }
  };
  std::unique_ptr<char, Free> memory_;
  char* next_;
};

// What follows a retrieval in a block (see NormParams): addresses of 0 leave out `also`, gamma to dbeta, and `running`,
// which is of mean, variance and the count of batches.
struct Norm {
  View o, x, out, also;
  int64_t mean, variance, gamma, beta, mask, dgamma, dbeta;
  View running;
  double eps, factor;
  bool relu, narrow, narrow_running;

  template <class Visit>
  void fields(Visit visit) {
    visit("o", o), visit("x", x), visit("out", out), visit("also", also);
    visit("mean", mean), visit("variance", variance), visit("gamma", gamma), visit("beta", beta), visit("mask", mask);
    visit("dgamma", dgamma), visit("dbeta", dbeta), visit("running", running);
    visit("eps", eps), visit("factor", factor);
    visit("relu", relu), visit("narrow", narrow), visit("narrow_running", narrow_running);
  }
};

// Bytes for norm_params(); `size` is that of an accumulation element.
inline int64_t norm_bytes(const ImageShape& image, const std::optional<Norm>& given, size_t size) {
  return given ? kernels().norm_workspace(image) * static_cast<int64_t>(size) : 0;
}

inline NormParams norm_params(const ImageShape& image, const std::optional<Norm>& given, bool batch_statistics,
                              size_t size, Scratch& scratch) {
  if (!given) return {};
  const Norm& n = *given;
  const int64_t elements = image.batch * image.channels * image.positions();
  for (const View* view : {&n.o, &n.x, &n.out}) present((*view)[0], elements, "maps of the norm");
  present(n.mean, image.channels, "mean of the norm"), present(n.variance, image.channels, "variance of the norm");
  require((n.running[0] == 0) == (n.running[1] == 0), "running: mean and variance, or neither");
  require(n.running[0] == 0 || image.batch * image.positions() != 1, "running: no variance of one element");
  char* partials = static_cast<char*>(scratch.take(norm_bytes(image, given, size)));
  void* factors = partials + (kernels().norm_workspace(image) - 4 * image.channels) * size;
  NormParams p = {};
  p.shape = image, p.o = map(n.o), p.x = map(n.x), p.out = map(n.out), p.also = map(n.also);
  p.mean = address(n.mean), p.variance = address(n.variance);
  p.gamma = address(n.gamma), p.beta = address(n.beta), p.mask = address(n.mask);
  p.dgamma = address(n.dgamma), p.dbeta = address(n.dbeta), p.narrow = n.narrow;
  p.eps = n.eps, p.relu = n.relu, p.batch_statistics = batch_statistics;
  p.partials = partials, p.factors = factors;
  p.running = {address(n.running[0]), address(n.running[1]), static_cast<int64_t*>(address(n.running[2])), n.factor,
               n.narrow_running};
  return p;
}

}  // namespace ela::binding

namespace pybind11::detail {

template <>
struct type_caster<ela::binding::Attention> : ela::binding::GroupCaster<ela::binding::Attention> {};
template <>
struct type_caster<ela::binding::Norm> : ela::binding::GroupCaster<ela::binding::Norm> {};

}  // namespace pybind11::detail
