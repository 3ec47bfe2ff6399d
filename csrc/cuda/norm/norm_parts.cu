// What needs no dtype of the maps, once for all of them.
#include "cuda/common/launch.cuh"
#include "cuda/norm/norm_parts.cuh"
#include "cuda/norm/norm_parts.h"

namespace ela::cuda {

constexpr int64_t kPartsShared = int64_t{4} * 3 * kWarps * kPartChannels;

int norm_statistics(const Target& target, const StatisticsCall& c) {
  const Shape& s = c.shape;
  if (s.batch < 1 || s.channels < 1 || s.channels >= kMaxChannels || s.positions < 1 || c.parts.chunks < 1 ||
      c.parts.span < 1 || (c.parts.chunks - 1) * c.parts.span >= s.positions) {
    return cudaErrorInvalidValue;
  }
  const DeviceGuard guard(target.device);
  if (guard.code() != cudaSuccess) return finish(guard.code());
  StatisticsParams p;
  p.moments_ptr = c.moments;
  p.statistics_ptr = c.statistics;
  p.channels = static_cast<int>(s.channels);
  p.parts = s.batch * c.parts.chunks;
  p.chunks = c.parts.chunks;
  p.span = c.parts.span;
  p.positions = s.positions;
  return finish(launch(&layer_norm_statistics_kernel, p, ceil_div<int64_t>(s.channels, kPartChannels), kPartsShared,
                       target.stream));
}

int launch_norm_sums(const NormBackwardCall& c, int64_t parts, void* stream) {
  const Shape& s = c.norm.shape;
  NormSumsParams p;
  p.partial_ptr = c.partial;
  p.statistics_ptr = c.norm.statistics;
  p.moved_ptr = c.moved;
  p.dgamma_ptr = c.dgamma;
  p.dbeta_ptr = c.dbeta;
  p.dgamma_dtype = c.norm.gamma.dtype;
  p.dbeta_dtype = c.norm.beta.dtype;
  p.channels = static_cast<int>(s.channels);
  p.parts = parts;
  p.count = static_cast<float>(s.batch * s.positions);
  p.eps = c.norm.eps;
  return launch(&layer_norm_sums_kernel, p, ceil_div<int64_t>(s.channels, kPartChannels), kPartsShared, stream);
}

}  // namespace ela::cuda
