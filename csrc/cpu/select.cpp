// Which instruction set's kernels run here.
#include "cpu/select.h"

#include <cstdlib>
#include <cstring>

namespace ela {

namespace {

#ifdef ELA_X86_SIMD
bool runs_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}
#endif

bool runs_here(const Kernels& k) {
#ifdef ELA_X86_SIMD
#ifdef ELA_X86_BF16
  if (&k == &kKernelsAvx512Bf16) return runs_avx512() && __builtin_cpu_supports("avx512bf16");
#endif
  if (&k == &kKernelsAvx512) return runs_avx512();
  if (&k == &kKernelsAvx2) {
    // F16C too is used, and Clang cannot ask for it; every processor with AVX2 has it.
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
#endif
  return &k == &kKernelsBaseline;
}

const Kernels& choose() {
  const std::vector<const Kernels*> levels = available_kernels();
  const char* wanted = std::getenv("ELA_KERNELS_SIMD");
  if (wanted != nullptr && *wanted != '\0') {
    for (const Kernels* k : levels) {
      if (std::strcmp(k->name, wanted) == 0) return *k;
    }
    std::string allowed;
    for (const Kernels* k : levels) allowed += (allowed.empty() ? "" : ", ") + std::string(k->name);
    throw std::invalid_argument(std::string("ELA_KERNELS_SIMD: got '") + wanted + "'; this processor and build allow " +
                                allowed);
  }
  return *levels.back();
}

}  // namespace

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> levels;
  const Kernels* all[] = {
      &kKernelsBaseline,
#ifdef ELA_X86_SIMD
      &kKernelsAvx2,
      &kKernelsAvx512,
#ifdef ELA_X86_BF16
      &kKernelsAvx512Bf16,
#endif
#endif
  };
  for (const Kernels* k : all) {
    if (runs_here(*k)) levels.push_back(k);
  }
  return levels;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace ela
