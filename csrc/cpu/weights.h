// Scores, softmax and divergence of one layer, and the gradients that flow back through them.
#pragma once

#include <math.h>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace ela::ELA_ISA {

template <class T>
inline Acc<T> dot_rows(const T* x, const T* y, int64_t count) {
  Vec<T> sum{};
  for_vectors<T>(count, [&](int64_t i, int n) { sum += load_n(x + i, n) * load_n(y + i, n); });
  return sum_lanes<T>(sum);
}

// A factor as it enters a sum over sources: one below the least normal number counts as none. A softmax over distant
// scores is full of them; what they add is lost in rounding, and a vector that they multiply takes a hundred times as
// long (measured: a tenth of a stage of 23 residual blocks).
template <class A>
inline A normal_factor(A x) {
  constexpr A kLeast = sizeof(A) == sizeof(float) ? static_cast<A>(0x1p-126) : static_cast<A>(0x1p-1022);
  return x < kLeast && x > -kLeast ? 0 : x;
}
template <class A>
inline A factor_at(const ColumnView& column, int64_t item) {
  const A factor = static_cast<const A*>(column.data)[item * column.stride];
  return column.is_given ? factor : normal_factor(factor);
}

inline float exponential(float x) { return expf(x); }
inline double exponential(double x) { return exp(x); }
inline float logarithm(float x) { return logf(x); }
inline double logarithm(double x) { return log(x); }

template <class T>
inline const T* row_of(const RowView& view, int64_t b, int64_t c) {
  return static_cast<const T*>(view.data) + b * view.batch + c;
}

// Writes scores minus their maximum to `scores`; returns the logarithm of the sum of their exponentials.
template <class T>
inline Acc<T> shifted_scores(const WeightsParams& p, int64_t b, int64_t g, Acc<T>* scores) {
  using A = Acc<T>;
  const int64_t head_dim = p.shape.head_dim();
  const T* query = row_of<T>(p.query, b, g * head_dim);
  A highest = -static_cast<A>(INFINITY);
  for (int64_t j = 0; j < p.depth; ++j) {
    scores[j] = static_cast<A>(p.scale) * dot_rows(query, row_of<T>(p.keys[j], b, g * head_dim), head_dim);
    if (scores[j] > highest) highest = scores[j];
  }
  A sum = 0;
  for (int64_t j = 0; j < p.depth; ++j) {
    scores[j] -= highest;
    sum += exponential(scores[j]);
  }
  return logarithm(sum);
}

template <class T>
void weights_kernel(const WeightsParams& p, int threads) {
  using A = Acc<T>;
  for_part(p.shape, p.shape.heads, threads, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      A* weights = static_cast<A*>(p.weights) + item * p.depth;
      const A log_sum = shifted_scores<T>(p, item / p.shape.heads, item % p.shape.heads, weights);
      if (p.kl != nullptr) {
        const A* prev = static_cast<const A*>(p.prev) + item * p.prev_depth;
        A kl = 0;
        for (int64_t j = 0; j < p.prev_depth; ++j) {
          if (prev[j] != 0) kl += prev[j] * (logarithm(prev[j]) - (weights[j] - log_sum));
        }
        static_cast<A*>(p.kl)[item] = kl;
      }
      for (int64_t j = 0; j < p.depth; ++j) weights[j] = exponential(weights[j] - log_sum);
    }
  });
}

// dscores, of the dot products before the scale, from the gradients of the weights (`dweights_sum`, depth numbers in
// double) and of the divergence.
template <class T>
inline void scores_gradient(const BackwardParams& p, int64_t item, const double* dweights_sum, Acc<T>* dscores) {
  using A = Acc<T>;
  const WeightsParams& f = p.forward;
  const A* weights = static_cast<const A*>(f.weights) + item * f.depth;
  double mean = 0;
  for (int64_t j = 0; j < f.depth; ++j) mean += weights[j] * dweights_sum[j];
  for (int64_t j = 0; j < f.depth; ++j) dscores[j] = static_cast<A>(weights[j] * (dweights_sum[j] - mean));
  if (p.dkl != nullptr && f.prev != nullptr) {
    const A dkl = static_cast<const A*>(p.dkl)[item];
    const A* prev = static_cast<const A*>(f.prev) + item * f.prev_depth;
    A mass = 0;
    for (int64_t j = 0; j < f.prev_depth; ++j) mass += prev[j];
    for (int64_t j = 0; j < f.depth; ++j) dscores[j] += dkl * mass * weights[j];
    for (int64_t j = 0; j < f.prev_depth; ++j) dscores[j] -= dkl * prev[j];
  }
  for (int64_t j = 0; j < f.depth; ++j) dscores[j] = normal_factor(dscores[j] * static_cast<A>(f.scale));
}

// d kl / d prev_j = log prev_j + 1 - log weights_j, from the scores and never from a rounded weight.
template <class T>
inline void prev_gradient(const BackwardParams& p, int64_t item, Acc<T>* scratch) {
  using A = Acc<T>;
  const WeightsParams& f = p.forward;
  const A log_sum = shifted_scores<T>(f, item / f.shape.heads, item % f.shape.heads, scratch);
  const A dkl = static_cast<const A*>(p.dkl)[item];
  const A* prev = static_cast<const A*>(f.prev) + item * f.prev_depth;
  A* dprev = static_cast<A*>(p.dprev) + item * f.prev_depth;
  for (int64_t j = 0; j < f.prev_depth; ++j) {
    dprev[j] = prev[j] == 0 ? static_cast<A>(0) : dkl * (logarithm(prev[j]) + 1 - (scratch[j] - log_sum));
  }
}

template <class T>
inline void query_and_key_gradients(const BackwardParams& p, int64_t item, const Acc<T>* dscores) {
  const WeightsParams& f = p.forward;
  const int64_t head_dim = f.shape.head_dim();
  const int64_t b = item / f.shape.heads;
  const int64_t c = item % f.shape.heads * head_dim;
  if (p.dquery.data != nullptr) {
    T* dquery = const_cast<T*>(row_of<T>(p.dquery, b, c));
    for_vectors<T>(head_dim, [&](int64_t i, int n) {
      Vec<T> sum{};
      for (int64_t j = 0; j < f.depth; ++j) sum += dscores[j] * load_n(row_of<T>(f.keys[j], b, c + i), n);
      store_n(dquery + i, sum, n);
    });
  }
  if (p.dkeys == nullptr) return;
  const T* query = row_of<T>(f.query, b, c);
  for (int64_t j = 0; j < f.depth; ++j) {
    if (p.dkeys[j].data == nullptr) continue;
    T* dkey = const_cast<T*>(row_of<T>(p.dkeys[j], b, c));
    for_vectors<T>(head_dim, [&](int64_t i, int n) { store_n(dkey + i, dscores[j] * load_n(query + i, n), n); });
  }
}

template <class T>
void gather_key_kernel(const GatherKeyParams& p, int threads) {
  using A = Acc<T>;
  const int64_t head_dim = p.shape.head_dim();
  for_part(p.shape, p.shape.heads, threads, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / p.shape.heads;
      const int64_t c = item % p.shape.heads * head_dim;
      T* dkey = const_cast<T*>(row_of<T>(p.dkey, b, c));
      for_vectors<T>(head_dim, [&](int64_t i, int n) {
        Vec<T> sum{};
        for (int64_t m = 0; m < p.sources; ++m) {
          sum += factor_at<A>(p.columns[m], item) * load_n(row_of<T>(p.queries[m], b, c + i), n);
        }
        store_n(dkey + i, sum, n);
      });
    }
  });
}

}  // namespace ela::ELA_ISA
