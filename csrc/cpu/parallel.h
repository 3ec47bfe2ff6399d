// Hides the threading.
#pragma once

#include <stdint.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/params.h"
#include "cpu/simd_target.h"

namespace ela::ELA_ISA {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Which of the threads of parallel_for calls: for scratch memory alone, never for what is computed. Not OpenMP's own
// number: whoever calls a kernel may be one of a parallel region's threads, and the kernel alone in its call.
inline thread_local int current_thread = 0;
inline int thread_index() { return current_thread; }

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
      const int before = current_thread;
      current_thread = static_cast<int>(me);
      body(items * me / count, items * (me + 1) / count);
      current_thread = before;
    }
    return;
  }
#endif
  if (items > 0) body(static_cast<int64_t>(0), items);
}

// The same over the part of `shape` that is wanted: of `items_each` for every sample, numbered through the batch. A
// part in heads or channels is one of a multiple of as many items.
template <class AnyShape, class Body>
inline void for_part(const AnyShape& shape, int64_t items_each, int threads, Body body) {
  const Part& part = shape.part;
  const int64_t count = part.count < 0 ? shape.batch * items_each : part.count * items_each / part.each;
  const int64_t first = part.first * items_each / part.each;
  parallel_for(count, threads, [&](int64_t begin, int64_t end) { body(first + begin, first + end); });
}

}  // namespace ela::ELA_ISA
