// Plans of launches that leave partial results for single channels: moments of a map, and sums over it. As in plan.h,
// sizes alone decide.
#pragma once

#include "cuda/common/plan.h"

namespace ela::cuda {

// Partial results are [2, batch * chunks, C]; a part is `span` positions of a sample, or what is left of them.
struct Parts {
  int64_t chunks, span;
};

inline Parts parts_of(const Grid& g, int64_t vec) {
  const int64_t across = int64_t{1} << g.across_log2;
  if (g.interleaved) return {g.outer, kPlanThreads / across * g.per_thread};
  return {g.inner, across * g.per_thread * vec};
}

inline int64_t parts_count(const Shape& s, const Parts& parts) { return 2 * s.batch * parts.chunks * s.channels; }

// Floats of shared memory in which the threads of a block bring their numbers together (see join.cuh).
inline int64_t join_floats(const Grid& g, int64_t vec) {
  constexpr int64_t kPlanWarps = kPlanThreads / kPlanWarp;
  if (!g.interleaved) return 3 * kPlanWarps;
  return kPlanWarps * (int64_t{1} << g.across_log2) * (1 + 2 * vec);
}

}  // namespace ela::cuda
