// Stores past the caches: of what is written once, is not read again here and is more than the caches keep. A processor
// reads a line before it writes to it through the caches, which a stored line spares.
#pragma once

#include "cpu/simd.h"

namespace ela::ELA_ISA {

// Whether vectors from `p` on can be stored so: each is then at an address of its own size.
template <class T>
inline bool is_streamable(const T* p) {
#if defined(__AVX2__)
  return reinterpret_cast<uintptr_t>(p) % (kLanes<T> * sizeof(T)) == 0;
#else
  static_cast<void>(p);
  return false;
#endif
}

template <class T>
inline void stream(T* p, Vec<T> x) {
#if defined(__AVX512F__) && ELA_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 2) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bits_of<__m256i>(narrow(x, T{})));
  } else {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bits_of<__m512i>(x));
  }
#elif defined(__AVX2__) && ELA_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 2) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), bits_of<__m128i>(narrow(x, T{})));
  } else {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bits_of<__m256i>(x));
  }
#else
  Memory<T>::store(p, x);
#endif
}

// Before another thread may read it.
inline void end_streaming() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

}  // namespace ela::ELA_ISA
