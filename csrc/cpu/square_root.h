// Square roots of vectors: of sqrt() a compiler makes a call where it has to set errno, and takes one lane at a time.
#pragma once

#include <math.h>

#include "cpu/simd.h"

namespace ela::ELA_ISA {

template <class V>
inline V square_roots(V x) {
#if defined(__AVX512F__) && ELA_VECTOR_BYTES == 64
  if constexpr (sizeof(x[0]) == sizeof(float)) {
    return bits_of<V>(_mm512_maskz_sqrt_ps(0xffff, bits_of<__m512>(x)));
  } else {
    return bits_of<V>(_mm512_maskz_sqrt_pd(0xff, bits_of<__m512d>(x)));
  }
#elif defined(__AVX2__) && ELA_VECTOR_BYTES == 32
  if constexpr (sizeof(x[0]) == sizeof(float)) {
    return bits_of<V>(_mm256_sqrt_ps(bits_of<__m256>(x)));
  } else {
    return bits_of<V>(_mm256_sqrt_pd(bits_of<__m256d>(x)));
  }
#else
  for (unsigned i = 0; i < sizeof(x) / sizeof(x[0]); ++i) x[i] = sqrt(x[i]);
  return x;
#endif
}

}  // namespace ela::ELA_ISA
