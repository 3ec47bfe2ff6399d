// Vectors by GCC/Clang vector extensions: one source for every instruction set. Each has a unit
// and a namespace of its own, so that the linker never merges two sets' code. No std:: templates here for the same
// reason.
#pragma once

#include <stdint.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "cpu/simd_target.h"

namespace ela::ELA_ISA {

using vfloat = float __attribute__((vector_size(ELA_VECTOR_BYTES)));
using vdouble = double __attribute__((vector_size(ELA_VECTOR_BYTES)));
using vint32 = int32_t __attribute__((vector_size(ELA_VECTOR_BYTES)));
using vuint32 = uint32_t __attribute__((vector_size(ELA_VECTOR_BYTES)));
using vuint64 = uint64_t __attribute__((vector_size(ELA_VECTOR_BYTES)));
using vuint16 = uint16_t __attribute__((vector_size(ELA_VECTOR_BYTES / 2)));

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// The accumulation type of an element type, its vector, and that vector's bits.
template <class T>
struct Traits {
  using A = float;
  using V = vfloat;
  using B = vuint32;
};
template <>
struct Traits<double> {
  using A = double;
  using V = vdouble;
  using B = vuint64;
};
template <class T>
using Acc = typename Traits<T>::A;
template <class T>
using Vec = typename Traits<T>::V;
template <class T>
using Bits = typename Traits<T>::B;
template <class T>
constexpr int kLanes = ELA_VECTOR_BYTES / sizeof(Acc<T>);

template <class To, class From>
inline To bits_of(const From& x) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To y;
  __builtin_memcpy(&y, &x, sizeof(y));
  return y;
}

// In twice the bits. GCC takes a plain conversion to vectors of more than 16 bytes apart.
inline vuint32 doubled(vuint16 h) {
#if defined(__AVX512F__) && ELA_VECTOR_BYTES == 64
  return bits_of<vuint32>(_mm512_maskz_cvtepu16_epi32(0xffff, bits_of<__m256i>(h)));
#elif defined(__AVX2__) && ELA_VECTOR_BYTES == 32
  return bits_of<vuint32>(_mm256_cvtepu16_epi32(bits_of<__m128i>(h)));
#else
  return __builtin_convertvector(h, vuint32);
#endif
}
inline vfloat widen(vuint16 h, bfloat16) { return bits_of<vfloat>(doubled(h) << 16); }

// Numbers below 2^16 in half the bits. What GCC makes of a plain conversion takes a tenth of the time of a convolution.
inline vuint16 halved(vuint32 x) {
#if defined(__AVX2__) && ELA_VECTOR_BYTES == 32
  const __m256i v = bits_of<__m256i>(x);
  return bits_of<vuint16>(_mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
#else
  return __builtin_convertvector(x, vuint16);
#endif
}

// Rounded to bfloat16, to nearest, ties to even, in the upper half of each lane; the lower is left over. A NaN, which
// rounding could carry over into a zero, becomes one of all bits.
inline vuint32 rounded_to_bfloat16(vfloat x) {
  const vuint32 u = bits_of<vuint32>(x);
  return ((u + 0x7fffu) + ((u >> 16) & 1u)) | bits_of<vuint32>(x != x);
}

#if defined(__AVX512BF16__) && ELA_VECTOR_BYTES == 64
// What is subnormal becomes zero. Rounding it as below where a vector has any, in a branch, cost a fifth of a forward.
inline vuint16 narrow(vfloat x, bfloat16) { return bits_of<vuint16>(_mm512_cvtneps_pbh(bits_of<__m512>(x))); }
#else
inline vuint16 narrow(vfloat x, bfloat16) { return halved(rounded_to_bfloat16(x) >> 16); }
#endif

#if defined(__AVX512F__) && ELA_VECTOR_BYTES == 64
// The masked forms with a full mask: the plain ones start from an undefined register, which GCC warns about.
inline vfloat widen(vuint16 h, float16) { return bits_of<vfloat>(_mm512_maskz_cvtph_ps(0xffff, bits_of<__m256i>(h))); }
inline vuint16 narrow(vfloat x, float16) {
  return bits_of<vuint16>(_mm512_maskz_cvtps_ph(0xffff, bits_of<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__) && ELA_VECTOR_BYTES == 32
inline vfloat widen(vuint16 h, float16) { return bits_of<vfloat>(_mm256_cvtph_ps(bits_of<__m128i>(h))); }
inline vuint16 narrow(vfloat x, float16) {
  return bits_of<vuint16>(_mm256_cvtps_ph(bits_of<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
}
#else
// Without hardware conversion. Exponents are rebased by exact multiplications with powers of two, so subnormals,
// infinities and NaN need no branch of their own on the way up.
inline vfloat widen(vuint16 h, float16) {
  const vuint32 w = __builtin_convertvector(h, vuint32) << 16;
  const vuint32 sign = w & 0x80000000u;
  const vuint32 magnitude = (w << 1) >> 4;  // exponent and mantissa at float's place, exponent not rebased
  const vfloat normal = bits_of<vfloat>(magnitude + (0xE0u << 23)) * 0x1.0p-112f;
  const vfloat subnormal = bits_of<vfloat>(((w << 1) >> 17) | (126u << 23)) - 0.5f;
  const vint32 is_subnormal = bits_of<vint32>((w << 1) >> 1) < (1 << 26);
  return bits_of<vfloat>(sign | bits_of<vuint32>(is_subnormal ? subnormal : normal));
}
inline vuint16 narrow(vfloat x, float16) {
  const vuint32 u = bits_of<vuint32>(x);
  const vuint32 sign = (u >> 16) & 0x8000u;
  const vuint32 magnitude = u & 0x7fffffffu;
  // Adding a power of two whose last mantissa bit is the half's last bit rounds to nearest even in hardware.
  const vint32 exponent = bits_of<vint32>(magnitude >> 23);
  const vint32 floor_exponent = exponent < 113 ? (vint32{} + 113) : exponent;
  const vfloat magic = bits_of<vfloat>(bits_of<vuint32>(floor_exponent + 13) << 23);
  const vuint32 steps = bits_of<vuint32>(bits_of<vfloat>(magnitude) + magic) - bits_of<vuint32>(magic);
  const vuint32 half = (bits_of<vuint32>(floor_exponent - 113) << 10) + steps;
  const vint32 overflow = bits_of<vint32>(magnitude) >= 0x477ff000;  // 65520: rounds to infinity
  const vint32 is_nan = bits_of<vint32>(magnitude) > 0x7f800000;
  const vuint32 finite = overflow ? (vuint32{} + 0x7c00u) : half;
  return __builtin_convertvector(sign | (is_nan ? (vuint32{} + 0x7e00u) : finite), vuint16);
}
#endif

// Up to four elements of two bytes, from and to memory that holds no more.
inline uint64_t load_some(const void* from, int n) {
  const char* p = static_cast<const char*>(from);
  uint64_t x = 0;
  if (n >= 4) {
    __builtin_memcpy(&x, p, 8);
    return x;
  }
  if (n & 2) __builtin_memcpy(&x, p, 4);
  if (n & 1) {
    uint16_t last;
    __builtin_memcpy(&last, p + (n & 2) * 2, 2);
    x |= static_cast<uint64_t>(last) << (n & 2) * 16;
  }
  return x;
}
inline void store_some(void* to, uint64_t x, int n) {
  char* p = static_cast<char*>(to);
  if (n >= 4) {
    __builtin_memcpy(p, &x, 8);
    return;
  }
  if (n & 2) __builtin_memcpy(p, &x, 4);
  if (n & 1) {
    const auto last = static_cast<uint16_t>(x >> (n & 2) * 16);
    __builtin_memcpy(p + (n & 2) * 2, &last, 2);
  }
}

template <class T>
struct Memory {  // two-byte types
  static vfloat load(const T* p) {
    vuint16 h;
    __builtin_memcpy(&h, p, sizeof(h));
    return widen(h, T{});
  }
  static void store(T* p, vfloat x) {
    const vuint16 h = narrow(x, T{});
    __builtin_memcpy(p, &h, sizeof(h));
  }
  static vfloat load_lanes(const T* p, int begin, int end) {
#if defined(__AVX512BW__) && defined(__AVX512VL__) && ELA_VECTOR_BYTES == 64
    const auto mask = static_cast<__mmask16>((1u << end) - (1u << begin));
    return widen(bits_of<vuint16>(_mm256_maskz_loadu_epi16(mask, p)), T{});
#else
    if (begin > 0) {
      uint16_t lanes[kLanes<T>] = {};
      for (int i = begin; i < end && i < kLanes<T>; ++i) lanes[i] = p[i].bits;
      return widen(bits_of<vuint16>(lanes), T{});
    }
    vfour four{};  // a copy of a run-time length is a call
    for (int k = 0; k < kFours; ++k) {
      if (4 * k < end) four[k] = load_some(p + 4 * k, end - 4 * k);
    }
    return widen(bits_of<vuint16>(four), T{});
#endif
  }
  static void store_part(T* p, vfloat x, int n) {
    const vuint16 h = narrow(x, T{});
#if defined(__AVX512BW__) && defined(__AVX512VL__) && ELA_VECTOR_BYTES == 64
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), bits_of<__m256i>(h));
#else
    const vfour four = bits_of<vfour>(h);
    for (int k = 0; k < kFours; ++k) {
      if (4 * k < n) store_some(p + 4 * k, four[k], n - 4 * k);
    }
#endif
  }
  static constexpr int kFours = kLanes<T> / 4;
  using vfour = uint64_t __attribute__((vector_size(ELA_VECTOR_BYTES / 2)));
};

template <class T>
struct NativeMemory {
  static Vec<T> load(const T* p) {
    Vec<T> v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
  static void store(T* p, Vec<T> x) { __builtin_memcpy(p, &x, sizeof(x)); }
};

// Parts of vectors. Where the instruction set has masked loads, lanes outside of a mask are not touched, and a part
// costs what a whole costs; a copy of a run-time length is a call.
template <class T>
struct CopiedParts : NativeMemory<T> {
  static Vec<T> load_lanes(const T* p, int begin, int end) {
    T lanes[kLanes<T>] = {};
    for (int i = begin; i < end && i < kLanes<T>; ++i) lanes[i] = p[i];
    return NativeMemory<T>::load(lanes);
  }
  static void store_part(T* p, Vec<T> x, int n) {
    if (n > kLanes<T>) __builtin_unreachable();  // or the compiler warns of it
    __builtin_memcpy(p, &x, n * sizeof(T));
  }
};
#if defined(__AVX512F__) && ELA_VECTOR_BYTES == 64
inline uint32_t lane_mask(int begin, int end) { return (1u << end) - (1u << begin); }
template <>
struct Memory<float> : NativeMemory<float> {
  static vfloat load_lanes(const float* p, int begin, int end) {
    return bits_of<vfloat>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(lane_mask(begin, end)), p));
  }
  static void store_part(float* p, vfloat x, int n) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>(lane_mask(0, n)), bits_of<__m512>(x));
  }
};
template <>
struct Memory<double> : NativeMemory<double> {
  static vdouble load_lanes(const double* p, int begin, int end) {
    return bits_of<vdouble>(_mm512_maskz_loadu_pd(static_cast<__mmask8>(lane_mask(begin, end)), p));
  }
  static void store_part(double* p, vdouble x, int n) {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(lane_mask(0, n)), bits_of<__m512d>(x));
  }
};
#elif defined(__AVX2__) && ELA_VECTOR_BYTES == 32
inline __m256i lane_mask_32(int begin, int end) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(begin), lane),
                             _mm256_cmpgt_epi32(_mm256_set1_epi32(end), lane));
}
inline __m256i lane_mask_64(int begin, int end) {
  const __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
  return _mm256_andnot_si256(_mm256_cmpgt_epi64(_mm256_set1_epi64x(begin), lane),
                             _mm256_cmpgt_epi64(_mm256_set1_epi64x(end), lane));
}
template <>
struct Memory<float> : NativeMemory<float> {
  static vfloat load_lanes(const float* p, int begin, int end) {
    return bits_of<vfloat>(_mm256_maskload_ps(p, lane_mask_32(begin, end)));
  }
  static void store_part(float* p, vfloat x, int n) { _mm256_maskstore_ps(p, lane_mask_32(0, n), bits_of<__m256>(x)); }
};
template <>
struct Memory<double> : NativeMemory<double> {
  static vdouble load_lanes(const double* p, int begin, int end) {
    return bits_of<vdouble>(_mm256_maskload_pd(p, lane_mask_64(begin, end)));
  }
  static void store_part(double* p, vdouble x, int n) {
    _mm256_maskstore_pd(p, lane_mask_64(0, n), bits_of<__m256d>(x));
  }
};
#else
template <>
struct Memory<float> : CopiedParts<float> {};
template <>
struct Memory<double> : CopiedParts<double> {};
#endif

// `x`, a number on its own: of a * b + c * d the compiler may round either product and add the other to it in one
// instruction, and takes the one here and the other there. Of settled(a * b) + c * d it rounds the first.
template <class V>
inline V settled(V x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

// The sum of all lanes, by halving: fewer roundings than one lane after the other.
template <class A, int kBytes>
struct Lanes {
  typedef A Vector __attribute__((vector_size(kBytes)));
  static A sum(Vector v) {
    if constexpr (kBytes == 2 * sizeof(A)) {
      return v[0] + v[1];
    } else {
      using Half = Lanes<A, kBytes / 2>;
      typename Half::Vector half[2];
      __builtin_memcpy(half, &v, sizeof(v));
      return Half::sum(half[0] + half[1]);
    }
  }
};
template <class T>
inline Acc<T> sum_lanes(Vec<T> v) {
  return Lanes<Acc<T>, ELA_VECTOR_BYTES>::sum(v);
}

// A number that is known when a body is compiled which takes it as `auto`.
template <int kN>
struct Count {
  static constexpr int value = kN;
  constexpr operator int() const { return kN; }
};

// Calls body(i, n) over [0, count) in steps of a vector; n < kLanes<T> only in the last step. A body that takes n as
// `auto` is compiled for whole vectors, and once more for a part: as an int, a body too large to be put into both
// places asks at each load and store which of them it is in.
template <class T, class Body>
inline void for_vectors(int64_t count, Body body) {
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) body(i, Count<kLanes<T>>{});
  if (i < count) body(i, static_cast<int>(count - i));
}

// Lanes [begin, end) of the vector at `p`, zeros in the others; memory outside of them is not touched.
template <class T>
inline Vec<T> load_lanes(const T* p, int begin, int end) {
  return begin == 0 && end == kLanes<T> ? Memory<T>::load(p) : Memory<T>::load_lanes(p, begin, end);
}
template <class T>
inline Vec<T> load_n(const T* p, int n) {
  return load_lanes(p, 0, n);
}
template <class T>
inline void store_n(T* p, Vec<T> x, int n) {
  n == kLanes<T> ? Memory<T>::store(p, x) : Memory<T>::store_part(p, x, n);
}

// All bits of lanes [begin, end), none of the others.
template <class T>
inline Bits<T> lane_bits(int begin, int end) {
  Bits<T> lane{};
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = static_cast<uint32_t>(i);  // a constant by the time it runs
  return bits_of<Bits<T>>((lane >= Bits<T>{} + static_cast<uint32_t>(begin)) &
                          (lane < Bits<T>{} + static_cast<uint32_t>(end)));
}
// `x` in the lanes of `bits`, zeros (or `other`) in the others, whatever `x` holds there.
template <class T>
inline Vec<T> keep(Vec<T> x, Bits<T> bits) {
  return bits_of<Vec<T>>(bits_of<Bits<T>>(x) & bits);
}
template <class T>
inline Vec<T> merge(Vec<T> x, Vec<T> other, Bits<T> bits) {
  return bits_of<Vec<T>>((bits_of<Bits<T>>(x) & bits) | (bits_of<Bits<T>>(other) & ~bits));
}

}  // namespace ela::ELA_ISA
