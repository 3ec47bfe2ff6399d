// Plans of the launches that aggregate maps, the forward and the gather, and of those that take dot products with them.
// As in common/plan.h, sizes alone decide.
#pragma once

#include "cuda/common/plan.h"

namespace ela::cuda {

// Bytes of shared memory of a list of maps, and their count (see retained.cuh).
inline int64_t list_bytes(int64_t maps) { return 4 * (maps + 1); }

// The shape of a launch that aggregates `sources` maps: the same for the forward and the gather.
struct AggregatePlan {
  Grid grid;
  int64_t heads;         // that a block touches, at most
  int64_t shared_bytes;  // of their weights
};

inline AggregatePlan plan_aggregate(const Shape& s, bool gapless, int64_t vec, int64_t sources) {
  static_assert(kForwardUnroll<4> == kForwardUnroll<8>, "one number for every vector");
  const int unroll = vec == 1 ? kForwardUnroll<1> : kForwardUnroll<4>;
  AggregatePlan plan;
  const auto heads = [&](int64_t across) { return heads_touched(s, across * vec); };
  if (s.interleaved) {
    plan.grid = plan_interleaved(s, vec, unroll, sources, 0, heads);
    plan.heads = heads(int64_t{1} << plan.grid.across_log2);
  } else {
    plan.grid = plan_planar(s, gapless, vec, unroll, true);
    plan.heads = heads_touched(s, (kPlanThreads >> plan.grid.across_log2) * plan.grid.row_channels);
  }
  plan.shared_bytes = 4 * sources * plan.heads;
  return plan;
}

// Partial sums of the dot products <dout, v_j>: of head h in sample b, `outer` x `inner` of them for each depth,
// [B, outer, G, inner, depth]. Planar: one for each row of the head and chunk of the row, outer = 1. Interleaved: one
// for each chunk of positions (outer) and run of channels that neighbouring lanes add up (inner).
struct Partials {
  int64_t outer, inner;
};

struct DotsPlan {
  Grid grid;
  Partials partials;
  int fold;   // neighbouring lanes that are added up
  int slots;  // sums that a warp is left with for each depth
};

inline DotsPlan plan_dots(const Shape& s, bool gapless, int64_t vec, int64_t element_size, int64_t depth) {
  DotsPlan plan;
  const int unroll = vec == 1 ? kDotsUnroll<1> : kDotsUnroll<4>;
  static_assert(kDotsUnroll<4> == kDotsUnroll<8>, "one number for every vector");
  if (s.interleaved) {
    const int64_t lanes = lanes_of_one_head(s.head_dim(), vec);
    const auto slots = [&](int64_t across) { return across / (lanes < across ? lanes : across); };
    // Narrower strips may add up fewer lanes: the widest run of lanes that every strip holds is 4.
    const int64_t least = ceil_quotient(4 * kPartialShare, (lanes < 4 ? lanes : 4) * vec * element_size);
    plan.grid = plan_interleaved(s, vec, unroll, depth, least,
                                 [&](int64_t across) { return kPlanThreads / kPlanWarp * slots(across); });
    const int64_t across = int64_t{1} << plan.grid.across_log2;
    plan.fold = static_cast<int>(lanes < across ? lanes : across);
    plan.slots = static_cast<int>(slots(across));
    plan.partials = {plan.grid.outer, s.head_dim() / (plan.fold * vec)};
  } else {
    plan.grid = plan_planar(s, gapless, vec, unroll, false);
    plan.fold = kPlanWarp;
    plan.slots = 1;
    plan.partials = {1, plan.grid.rows / s.heads * plan.grid.inner};
  }
  return plan;
}

inline int64_t partial_count(const Shape& s, const Partials& partials, int64_t depth) {
  return s.batch * partials.outer * s.heads * partials.inner * depth;
}

// Floats that hold the partial sums of a call whatever its alignment, which a caller need not know.
inline int64_t backward_workspace(const Shape& s, int64_t element_size, int64_t depth) {
  int64_t most = 0;
  for (const int64_t vec : {16 / element_size, int64_t{1}}) {
    for (const bool gapless : {false, true}) {
      const int64_t count = partial_count(s, plan_dots(s, gapless, vec, element_size, depth).partials, depth);
      if (count > most) most = count;
    }
  }
  return most;
}

}  // namespace ela::cuda
