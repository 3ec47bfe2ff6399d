// Hides the threading. Included inside each instruction set's namespace.

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Which of the threads of parallel_for calls: for scratch memory alone, never for what is computed.
inline int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Calls body(begin, end) on contiguous parts of [0, items). What an item computes never depends on the part it
// falls into, so results do not depend on the number of threads.
template <class Body>
inline void parallel_for(int64_t items, int threads, Body body) {
#ifdef _OPENMP
  if (threads > 1 && items > 1) {
    if (threads > items) threads = static_cast<int>(items);
#pragma omp parallel num_threads(threads)
    {
      const int64_t count = omp_get_num_threads();
      const int64_t me = omp_get_thread_num();
      body(items * me / count, items * (me + 1) / count);
    }
    return;
  }
#endif
  if (items > 0) body(static_cast<int64_t>(0), items);
}

// The same over the samples of `shape` that are wanted: items are numbered through the whole batch.
template <class AnyShape, class Body>
inline void for_samples(const AnyShape& shape, int64_t items_each, int threads, Body body) {
  const int64_t count = shape.samples.count < 0 ? shape.batch : shape.samples.count;
  const int64_t first = shape.samples.first * items_each;
  parallel_for(count * items_each, threads, [&](int64_t begin, int64_t end) { body(first + begin, first + end); });
}
