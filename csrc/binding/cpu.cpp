// Python's view of the CPU kernels: addresses and strides as integers, no tensor type. Every function checks only what
// would be out of bounds here; the checks a user sees are Python's.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "cpu/params.h"
#include "cpu/select.h"

namespace py = pybind11;

namespace {

using ela::AggregateParams;
using ela::BackwardParams;
using ela::ColumnView;
using ela::GatherKeyParams;
using ela::MapView;
using ela::RowView;
using ela::Shape;
using ela::WeightsParams;

using Ints = std::vector<int64_t>;

void* address(int64_t x) { return reinterpret_cast<void*>(static_cast<uintptr_t>(x)); }

template <class View, size_t N>
std::vector<View> views(const Ints& table) {
  if (table.size() % N != 0) throw std::invalid_argument("view table: incomplete last entry");
  std::vector<View> out;
  out.reserve(table.size() / N);
  for (size_t i = 0; i < table.size(); i += N) {
    if constexpr (N == 3) {
      out.push_back({address(table[i]), table[i + 1], table[i + 2]});
    } else {
      out.push_back({address(table[i]), table[i + 1]});
    }
  }
  return out;
}

std::vector<MapView> maps(const Ints& t) { return views<MapView, 3>(t); }
std::vector<RowView> rows(const Ints& t) { return views<RowView, 2>(t); }
std::vector<ColumnView> columns(const Ints& t) { return views<ColumnView, 2>(t); }

// B, C, G, N, interleaved
Shape shape_of(const std::array<int64_t, 5>& s) {
  if (s[0] < 0 || s[3] < 0 || s[2] < 1 || s[1] < s[2] || s[1] % s[2] != 0) {
    throw std::invalid_argument("shape: heads must divide channels, sizes must not be negative");
  }
  return {s[0], s[1], s[2], s[3], s[4] != 0};
}

int checked_dtype(int dtype) {
  if (dtype < 0 || dtype >= ela::kDTypes) throw std::invalid_argument("dtype: unknown code");
  return dtype;
}

size_t element_size(int dtype) { return dtype == static_cast<int>(ela::DType::kFloat64) ? 8 : 4; }

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

WeightsParams weights_params(const Shape& shape, double scale, const Ints& query, const std::vector<RowView>& keys,
                             int64_t prev, int64_t prev_depth, int64_t weights, int64_t kl) {
  const int64_t depth = static_cast<int64_t>(keys.size());
  require(query.size() == 2, "query: needs address and batch stride");
  require(depth >= 1 && (prev == 0 || (prev_depth >= 1 && prev_depth <= depth)), "depth: previous weights too long");
  return {shape,       depth,         prev == 0 ? 0 : prev_depth, scale,      {address(query[0]), query[1]},
          keys.data(), address(prev), address(weights),           address(kl)};
}

void weights(int dtype, const std::array<int64_t, 5>& sizes, double scale, const Ints& query, const Ints& keys,
             int64_t prev, int64_t prev_depth, int64_t weights, int64_t kl, int threads) {
  const std::vector<RowView> key_views = rows(keys);
  const WeightsParams p =
      weights_params(shape_of(sizes), scale, query, key_views, prev, prev_depth, weights, prev == 0 ? 0 : kl);
  const auto kernel = ela::kernels().weights[checked_dtype(dtype)];
  py::gil_scoped_release unlocked;
  kernel(p, threads);
}

void forward(int dtype, const std::array<int64_t, 5>& sizes, double scale, const Ints& query, const Ints& keys,
             const Ints& values, int64_t prev, int64_t prev_depth, int64_t weights, int64_t kl, const Ints& out,
             int64_t workspace, int threads) {
  const Shape shape = shape_of(sizes);
  const std::vector<RowView> key_views = rows(keys);
  const std::vector<MapView> value_views = maps(values);
  const std::vector<MapView> out_view = maps(out);
  require(value_views.size() == key_views.size() && out_view.size() == 1, "values: one for each key, and one out");
  const WeightsParams p = weights_params(shape, scale, query, key_views, prev, prev_depth, weights, prev == 0 ? 0 : kl);
  std::vector<ColumnView> weight_columns;
  weight_columns.reserve(key_views.size());
  for (int64_t j = 0; j < p.depth; ++j) {
    weight_columns.push_back({static_cast<char*>(p.weights) + j * element_size(checked_dtype(dtype)), p.depth});
  }
  const AggregateParams a = {shape,       p.depth,           value_views.data(), weight_columns.data(),
                             out_view[0], address(workspace)};
  const ela::Kernels& k = ela::kernels();
  py::gil_scoped_release unlocked;
  k.weights[dtype](p, threads);
  k.aggregate[dtype](a, threads);
}

// One layer's backward. The push form asks for dkeys and dvalues here; the pull form gathers them later, by gather_key
// and aggregate, from the dscores and douts of all layers that retrieved.
void backward(int dtype, const std::array<int64_t, 5>& sizes, double scale, const Ints& query, const Ints& keys,
              const Ints& values, int64_t prev, int64_t prev_depth, int64_t weights, const Ints& dout, int64_t dweights,
              int64_t dkl, int64_t dscores, const Ints& dquery, const Ints& dkeys, int64_t dprev, const Ints& dvalues,
              int64_t workspace, int threads) {
  const Shape shape = shape_of(sizes);
  const std::vector<RowView> key_views = rows(keys);
  const std::vector<RowView> dkey_views = rows(dkeys);
  const std::vector<MapView> value_views = maps(values);
  const std::vector<MapView> dvalue_views = maps(dvalues);
  const std::vector<MapView> dout_view = maps(dout);
  const std::vector<RowView> dquery_view = rows(dquery);
  const size_t depth = key_views.size();
  require(dout_view.empty() || value_views.size() == depth, "values: one for each key");
  require(dkey_views.empty() || dkey_views.size() == depth, "dkeys: one for each key, or none");
  require(dvalue_views.empty() || (dvalue_views.size() == depth && !dout_view.empty()), "dvalues: one each, or none");
  require(dprev == 0 || (prev != 0 && dkl != 0), "dprev: needs previous weights and dkl");
  const BackwardParams p = {
      weights_params(shape, scale, query, key_views, prev, prev_depth, weights, 0),
      value_views.data(),
      dout_view.empty() ? nullptr : dout_view.data(),
      address(dweights),
      address(dkl),
      address(dscores),
      dquery_view.empty() ? RowView{nullptr, 0} : dquery_view[0],
      dkey_views.empty() ? nullptr : dkey_views.data(),
      address(dprev),
      dvalue_views.empty() ? nullptr : dvalue_views.data(),
      address(workspace),
  };
  const auto kernel = ela::kernels().backward[checked_dtype(dtype)];
  py::gil_scoped_release unlocked;
  kernel(p, threads);
}

void aggregate(int dtype, const std::array<int64_t, 5>& sizes, const Ints& sources, const Ints& weight_columns,
               const Ints& out, int64_t workspace, int threads) {
  const std::vector<MapView> source_views = maps(sources);
  const std::vector<ColumnView> column_views = columns(weight_columns);
  const std::vector<MapView> out_view = maps(out);
  require(!source_views.empty() && source_views.size() == column_views.size() && out_view.size() == 1,
          "sources: one column of weights each, at least one, and one out");
  const AggregateParams p = {shape_of(sizes),     static_cast<int64_t>(source_views.size()),
                             source_views.data(), column_views.data(),
                             out_view[0],         address(workspace)};
  const auto kernel = ela::kernels().aggregate[checked_dtype(dtype)];
  py::gil_scoped_release unlocked;
  kernel(p, threads);
}

void gather_key(int dtype, const std::array<int64_t, 5>& sizes, const Ints& queries, const Ints& score_columns,
                const Ints& dkey, int threads) {
  const std::vector<RowView> query_views = rows(queries);
  const std::vector<ColumnView> column_views = columns(score_columns);
  const std::vector<RowView> dkey_view = rows(dkey);
  require(query_views.size() == column_views.size() && dkey_view.size() == 1, "queries: one column each, and one dkey");
  const GatherKeyParams p = {shape_of(sizes), static_cast<int64_t>(query_views.size()), query_views.data(),
                             column_views.data(), dkey_view[0]};
  const auto kernel = ela::kernels().gather_key[checked_dtype(dtype)];
  py::gil_scoped_release unlocked;
  kernel(p, threads);
}

}  // namespace

void bind_cpu(py::module_& m) {
  m.def("simd_level", [] { return std::string(ela::kernels().name); });
  m.def("simd_levels", [] {
    std::vector<std::string> names;
    for (const ela::Kernels* k : ela::available_kernels()) names.emplace_back(k->name);
    return names;
  });
  m.def("weights", &weights);
  m.def("forward", &forward);
  m.def("backward", &backward);
  m.def("aggregate", &aggregate);
  m.def("gather_key", &gather_key);
  m.def("aggregate_workspace", [](const std::array<int64_t, 5>& sizes, int64_t sources) {
    return ela::kernels().aggregate_workspace(shape_of(sizes), sources);
  });
  m.def("backward_workspace", [](const std::array<int64_t, 5>& sizes, int64_t depth) {
    return ela::kernels().backward_workspace(shape_of(sizes), depth);
  });
}
