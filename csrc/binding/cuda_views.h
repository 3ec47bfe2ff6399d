// What the bindings of the CUDA kernels share: tensors as addresses, sizes and strides, checked for what a kernel could
// not bear.
#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "binding/named.h"
#include "cuda/attention/attention.h"
#include "cuda/common/parameter.h"

namespace ela::cuda::binding {

using Ints = std::vector<int64_t>;
using Sizes = std::array<int64_t, 5>;    // B, C, G, N, interleaved
using Strides = std::array<int64_t, 2>;  // batch, inner
using View = std::array<int64_t, 3>;     // address, batch stride, inner stride; address 0 = absent

inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

// Refuses an address of 0 of what a kernel would read or write. What may be left out is not asked.
inline void present(int64_t address, const char* name) {
  if (address == 0) throw std::invalid_argument(std::string(name) + ": no address");
}
inline void present(const std::vector<const void*>& addresses, const char* name) {
  for (const void* x : addresses) present(reinterpret_cast<int64_t>(x), name);
}

template <class T = void>
inline T* address(int64_t x) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(x));
}

// Addresses of tensors, of which single ones may be 0. Lists that go to a kernel are checked against its depth here,
// before anything is copied.
inline std::vector<const void*> addresses(const Ints& list) {
  require(list.size() <= ela::cuda::kMaxDepth, "more tensors than the CUDA kernels' greatest depth");
  std::vector<const void*> out;
  out.reserve(list.size());
  for (const int64_t x : list) out.push_back(address(x));
  return out;
}

inline int64_t length(const std::vector<const void*>& list) { return static_cast<int64_t>(list.size()); }

inline Shape shape_of(const Sizes& s) {
  require(s[0] >= 1 && s[3] >= 1 && s[2] >= 1 && s[1] >= s[2] && s[1] % s[2] == 0,
          "sizes: heads must divide channels, and no size may be zero");
  return {s[0], s[1], s[2], s[3], s[4] != 0};
}

inline DType checked_dtype(int dtype) {
  require(dtype >= 0 && dtype < ela::kDTypes, "dtype: unknown code");
  return static_cast<DType>(dtype);
}

inline int64_t element_size(int dtype) { return checked_dtype(dtype) == DType::kFloat32 ? 4 : 2; }

using Small = std::array<int64_t, 2>;  // a parameter: address, and dtype; address 0 = absent

inline Parameter parameter(const Small& given) {
  const DType dtype = checked_dtype(static_cast<int>(given[1]));
  require(dtype != DType::kFloat64, "dtype: no parameters in float64");
  return {address(given[0]), dtype};
}

inline MapView map(const View& view) { return {address(view[0]), view[1], view[2]}; }

// Index of a device, and the handle of a stream.
using Where = std::array<int64_t, 2>;

inline Target target(const Where& where) { return {static_cast<int>(where[0]), address(where[1])}; }

// One above 1 would leave out a residual, whose weight that is.
inline float checked_tolerance(double tolerance) {
  require(tolerance >= 0 && tolerance <= 1, "tolerance: no weight");
  return static_cast<float>(tolerance);
}

// One layer's attention. `prev` may be left out, with a depth of 0. Values of a weight below `tolerance` are left out.
struct Attention {
  double scale, tolerance;
  int64_t query, query_stride;
  Ints keys;
  int64_t key_stride;
  Ints values;
  Strides value_strides;
  int64_t prev, prev_depth, weights;

  template <class Visit>
  void fields(Visit visit) {
    visit("scale", scale), visit("tolerance", tolerance), visit("query", query), visit("query_stride", query_stride);
    visit("keys", keys), visit("key_stride", key_stride), visit("values", values),
        visit("value_strides", value_strides);
    visit("prev", prev), visit("prev_depth", prev_depth), visit("weights", weights);
  }
};

// `kl` may be left out. `keys`: addresses() of those of the attention.
inline WeightsCall weights_call(const Sizes& sizes, const Attention& a, const std::vector<const void*>& keys,
                                int64_t kl) {
  require(!keys.empty(), "keys: at least one");
  present(a.query, "query"), present(keys, "keys"), present(a.weights, "weights");
  if (a.prev_depth != 0) present(a.prev, "previous weights");
  require(a.prev == 0 || (a.prev_depth >= 1 && a.prev_depth <= length(keys)), "depth: previous weights too long");
  return {shape_of(sizes),
          static_cast<float>(a.scale),
          address(a.query),
          a.query_stride,
          {keys.data(), length(keys), a.key_stride},
          address<float>(a.prev),
          a.prev == 0 ? 0 : a.prev_depth,
          address<float>(a.weights),
          a.prev == 0 ? nullptr : address<float>(kl),
          checked_tolerance(a.tolerance)};
}

}  // namespace ela::cuda::binding

namespace pybind11::detail {

template <>
struct type_caster<ela::cuda::binding::Attention> : ela::binding::GroupCaster<ela::cuda::binding::Attention> {};

}  // namespace pybind11::detail
