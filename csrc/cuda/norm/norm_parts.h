// The second launch of the norm's backward, for any dtype of the maps.
#pragma once

#include "cuda/norm/norm.h"

namespace ela::cuda {

// Adds up the partial sums of `call`, `parts` of each channel, and writes what follows from them. Returns a CUDA error
// code; the device is the current one already.
int launch_norm_sums(const NormBackwardCall& call, int64_t parts, void* stream);

}  // namespace ela::cuda
