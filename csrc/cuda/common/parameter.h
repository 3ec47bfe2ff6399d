// A parameter, or another small vector, in whatever dtype it is kept: mixed precision keeps them wider than the maps.
#pragma once

#include "views.h"

namespace ela::cuda {

// float32, bfloat16 or float16; `data` null where there is none.
struct Parameter {
  const void* data;
  DType dtype;
};

}  // namespace ela::cuda
