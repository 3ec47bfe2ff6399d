#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/params.h"

namespace ela {

// Narrowest first: those compiled in that this processor runs.
std::vector<const Kernels*> available_kernels();

}  // namespace ela
