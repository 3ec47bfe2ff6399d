// The second launch of the producer's backward; the same for maps of every dtype.
#pragma once

#include <cuda_runtime.h>

#include "cuda/layer/producer.h"
#include "cuda/layer/producer_plan.h"

namespace ela::cuda {

// Adds up the partial sums of the filters' gradients that the first launch left in the workspace of `c`.
cudaError_t launch_filter_sums(const ProducerBackwardCall& c, const ProducerPartials& partials, void* stream);

}  // namespace ela::cuda
