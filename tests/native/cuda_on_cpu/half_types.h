// Conversions between float32 and the two types of 16 bits, as a device does them: to the nearest, ties to even, with
// subnormals, and NaN stays NaN.
#pragma once

#include <cstdint>
#include <cstring>

namespace cuda_on_cpu {

inline uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

inline uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

inline float bfloat16_to_float(uint16_t x) { return bits_float(uint32_t{x} << 16); }

// `bits` / 2^shift, to the nearest, ties to even.
inline uint32_t shift_right_rounded(uint32_t bits, int shift) {
  const uint32_t half = uint32_t{1} << (shift - 1);
  const uint32_t odd = (bits >> shift) & 1;
  return (bits + half - 1 + odd) >> shift;
}

inline uint16_t float_to_half(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fffu;
  const int exponent = static_cast<int>(magnitude >> 23) - 127;
  if (exponent > 15) return static_cast<uint16_t>(sign | 0x7c00u);
  // A carry out of the mantissa goes into the exponent, up to infinity, as it should.
  if (exponent >= -14) return static_cast<uint16_t>(sign | shift_right_rounded(magnitude - (112u << 23), 13));
  if (exponent < -25) return static_cast<uint16_t>(sign);
  const uint32_t mantissa = (magnitude & 0x7fffffu) | 0x800000u;
  return static_cast<uint16_t>(sign | shift_right_rounded(mantissa, -exponent - 1));
}

inline float half_to_float(uint16_t x) {
  const uint32_t sign = uint32_t{x & 0x8000u} << 16;
  const uint32_t magnitude = x & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x400u) return bits_float(sign | ((magnitude << 13) + (112u << 23)));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  return bits_float(sign | float_bits(subnormal));
}

}  // namespace cuda_on_cpu
