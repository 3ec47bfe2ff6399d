// The yardstick of the benchmarks: reads every element once, in order, and does nothing else with it.

template <class T>
inline Acc<T> sum_all(const T* x, int64_t count) {
  constexpr int kUnroll = 4;
  Vec<T> sums[kUnroll] = {};
  int64_t i = 0;
  for (; i + kUnroll * kLanes<T> <= count; i += kUnroll * kLanes<T>) {
    for (int u = 0; u < kUnroll; ++u) sums[u] += Memory<T>::load(x + i + u * kLanes<T>);
  }
  for_vectors<T>(count - i, [&](int64_t k, int n) { sums[0] += load_n(x + i + k, n); });
  return sum_lanes<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// `result` takes one sum for each of the `threads` parts of each source, [sources, threads], so that no read can be
// left out by the compiler.
template <class T>
void read_probe_kernel(const void* const* sources, int64_t count, int64_t elements, void* result, int threads) {
  parallel_for(threads, threads, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = elements * part / threads;
      const int64_t last = elements * (part + 1) / threads;
      for (int64_t j = 0; j < count; ++j) {
        static_cast<Acc<T>*>(result)[j * threads + part] =
            sum_all(static_cast<const T*>(sources[j]) + first, last - first);
      }
    }
  });
}
