// The plan of an attention that makes its own query and key.
#pragma once

#include "cuda/attention/attention_plan.h"
#include "cuda/common/channel_plan.h"

namespace ela::cuda {

// A launch costs the time in which the caches give about this much.
constexpr int64_t kLaunchBytes = int64_t{4} << 20;
// Bytes of maps for each byte of sums that the blocks read, at least, beyond that.
constexpr int64_t kRowShare = 8;
// Value elements that a block reads for each key element, at least, beyond that: the moments are of single channels, of
// which a block has few, so that a wide head would be scored by very many blocks.
constexpr int64_t kLeastScoreShare = 4;

// Elements of a map that a block works on.
inline int64_t block_elements(const Grid& g, int64_t vec) {
  const int64_t across = int64_t{1} << g.across_log2, along = kPlanThreads / across;
  const int64_t step = g.interleaved ? along : across;
  const int64_t of_length = step * g.per_thread < g.length ? step * g.per_thread : g.length;
  return of_length * vec * (g.interleaved ? across : along);
}

// Where query, own key and weights come from.
enum class Origin {
  kLaunch,   // all are made in the launch that aggregates
  kRows,     // the rows are made by a launch of their own
  kWeights,  // rows and weights are made by launches of their own
};

struct AttendPlan {
  AggregatePlan aggregate;
  Origin origin;
  int64_t scratch_at;    // floats of shared memory before the scratch space
  int64_t shared_bytes;  // in all
};

// `sources`: the values, and the residual. Rows are made in the launch where its blocks together read few bytes of sums
// and have room for the rows of their heads: each block reads 4 * groups bytes for a channel of its heads and for the
// channels beyond them that the filters reach, where it reads `depth` keys of 2 or 4 bytes, all from the caches.
inline AttendPlan plan_attend(const Shape& s, bool gapless, int64_t vec, int64_t element_size, int64_t sources,
                              int64_t groups, int64_t size, bool moments) {
  AttendPlan plan;
  plan.aggregate = plan_aggregate(s, gapless && !moments, vec, sources);
  const Grid& grid = plan.aggregate.grid;
  const int64_t scored = plan.aggregate.heads * s.head_dim();
  const int64_t row_floats = 3 * (scored + size);
  const int64_t row_bytes = 4 * groups * (scored + 2 * (size / 2)) * grid.items;
  const int64_t map_bytes = element_size * (sources + 1) * s.batch * s.channels * s.positions;
  plan.scratch_at = plan.aggregate.shared_bytes / 4;
  int64_t scratch = moments ? join_floats(grid, vec) : 0;
  const int64_t key_bytes = element_size * sources * scored * grid.items;
  if (moments && key_bytes > kLaunchBytes && block_elements(grid, vec) < kLeastScoreShare * scored) {
    plan.origin = Origin::kWeights;
  } else if (4 * (plan.scratch_at + row_floats) > kPreferredShared ||
             (row_bytes > kLaunchBytes && row_bytes * kRowShare > map_bytes)) {
    plan.origin = Origin::kRows;
  } else {
    plan.origin = Origin::kLaunch;
    scratch = scratch > row_floats ? scratch : row_floats;
  }
  plan.shared_bytes = 4 * (plan.scratch_at + scratch);
  return plan;
}

// Floats that hold the moments of an attention's output whatever its alignment, which a caller need not know.
inline int64_t attend_moments(const Shape& s, int64_t element_size, int64_t sources) {
  int64_t most = 0;
  for (const int64_t vec : {16 / element_size, int64_t{1}}) {
    const int64_t count = parts_count(s, parts_of(plan_aggregate(s, false, vec, sources).grid, vec));
    if (count > most) most = count;
  }
  return most;
}

}  // namespace ela::cuda
