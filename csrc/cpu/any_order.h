// Loops over contiguous elements whose order in vectors does not matter, as long as all that meet there have the same.
//
// Two vectors of bfloat16 are then widened with an instruction each, one that keeps the even elements of a run and one
// that keeps the odd, and two are rounded into one store. In their order a vector takes two instructions more each way.
#pragma once

#include "cpu/simd.h"

namespace ela::ELA_ISA {

// Whether the halves of a run are its even and its odd elements, and not its first and its last.
template <class T>
constexpr bool kIsMixed = false;
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
template <>
constexpr bool kIsMixed<bfloat16> = true;
#endif

// One half of the two vectors from element i on. What is in the accumulation type, such as a running sum, is read and
// written as these loops leave it: the first half, then the other.
template <class T, int kHalf>
struct Half {
  static constexpr int half = kHalf;
  int64_t i;
  template <class E>
  Vec<T> load(const E* p) const {
    if constexpr (kIsMixed<T> && sizeof(E) == sizeof(T)) {
      vuint32 both;
      __builtin_memcpy(&both, p + i, sizeof(both));
      return bits_of<vfloat>(kHalf == 0 ? both << 16 : both & 0xffff0000u);
    } else {
      return Memory<E>::load(p + i + kHalf * kLanes<T>);
    }
  }
  void store(Acc<T>* p, Vec<T> x) const { Memory<Acc<T>>::store(p + i + kHalf * kLanes<T>, x); }
  Vec<T> clear(Vec<T> x) const { return x; }
};

// What is left at the end: a vector in its order, or the first n lanes of one.
template <class T, class N>
struct Rest {
  static constexpr int half = 0;
  int64_t i;
  N n;
  template <class E>
  Vec<T> load(const E* p) const {
    return load_n(p + i, n);
  }
  void store(Acc<T>* p, Vec<T> x) const { store_n(p + i, x, n); }
  // Zeros in the lanes that are not there.
  Vec<T> clear(Vec<T> x) const { return n == kLanes<T> ? x : keep<T>(x, lane_bits<T>(0, n)); }
};

template <class T>
inline void store_halves(T* p, Vec<T> first, Vec<T> second) {
  Memory<T>::store(p, first);
  Memory<T>::store(p + kLanes<T>, second);
}
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
inline void store_halves(bfloat16* p, vfloat even, vfloat odd) {
#if defined(__AVX512BF16__) && ELA_VECTOR_BYTES == 64
  using vorder = uint16_t __attribute__((vector_size(64)));
  constexpr vorder order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                            8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const auto both = bits_of<__m512i>(_mm512_cvtne2ps_pbh(bits_of<__m512>(odd), bits_of<__m512>(even)));
  const __m512i mixed = _mm512_maskz_permutexvar_epi16(0xffffffffu, bits_of<__m512i>(order), both);
#else
  const vuint32 mixed = (rounded_to_bfloat16(even) >> 16) | (rounded_to_bfloat16(odd) & 0xffff0000u);
#endif
  __builtin_memcpy(p, &mixed, sizeof(mixed));
}
#endif

// The halves of a run of T, in the order of its elements, in the accumulation type.
template <class T>
inline void store_in_order(Acc<T>* p, Vec<T> first, Vec<T> second) {
  if constexpr (kIsMixed<T>) {
#if defined(__AVX512F__) && ELA_VECTOR_BYTES == 64
    constexpr vint32 low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    const __m512 even = bits_of<__m512>(first), odd = bits_of<__m512>(second);
    first = bits_of<vfloat>(_mm512_permutex2var_ps(even, bits_of<__m512i>(low), odd));
    second = bits_of<vfloat>(_mm512_permutex2var_ps(even, bits_of<__m512i>(low + 8), odd));
#elif defined(__AVX2__) && ELA_VECTOR_BYTES == 32
    const __m256 even = bits_of<__m256>(first), odd = bits_of<__m256>(second);
    const __m256 low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
    first = bits_of<vfloat>(_mm256_permute2f128_ps(low, high, 0x20));
    second = bits_of<vfloat>(_mm256_permute2f128_ps(low, high, 0x31));
#else
    Vec<T> low{}, high{};
    for (int i = 0; i < kLanes<T> / 2; ++i) {
      low[2 * i] = first[i], low[2 * i + 1] = second[i];
      high[2 * i] = first[kLanes<T> / 2 + i], high[2 * i + 1] = second[kLanes<T> / 2 + i];
    }
    first = low, second = high;
#endif
  }
  store_halves(p, first, second);
}

// Calls body(at) over [0, count): at.load(p) is the vector there of p.
template <class T, class Body>
inline void for_any_order(int64_t count, Body body) {
  constexpr int64_t step = 2 * kLanes<T>;
  int64_t i = 0;
  for (; i + step <= count; i += step) {
    body(Half<T, 0>{i});
    body(Half<T, 1>{i});
  }
  for_vectors<T>(count - i, [&](int64_t k, auto n) { body(Rest<T, decltype(n)>{i + k, n}); });
}

// out = body(at) over [0, count), rounded to the type of the map, or in the accumulation type in order. Of what is as
// wide as that, a vector at a time: by two, a backward's gather of float took up to a twentieth longer.
template <class T, class Out, class Body>
inline void map_any_order(int64_t count, Out* out, Body body) {
  constexpr int64_t step = 2 * kLanes<T>;
  int64_t i = 0;
  if constexpr (sizeof(T) < sizeof(Acc<T>)) {
    for (; i + step <= count; i += step) {
      const Vec<T> first = body(Half<T, 0>{i}), second = body(Half<T, 1>{i});
      if constexpr (sizeof(Out) == sizeof(T)) {
        store_halves(out + i, first, second);
      } else {
        store_in_order<T>(out + i, first, second);
      }
    }
  }
  for_vectors<T>(count - i, [&](int64_t k, auto n) { store_n(out + i + k, body(Rest<T, decltype(n)>{i + k, n}), n); });
}

}  // namespace ela::ELA_ISA
