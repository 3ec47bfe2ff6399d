// Exponentials of vectors.
#pragma once

#include <math.h>

#include "cpu/simd.h"

namespace ela::ELA_ISA {

// e^y of y <= 0, as accurate as float is, and 0 below kLeast, which is at least -87: a subnormal result, or a product
// with one, takes a hundred times as long. A NaN stays one.
template <int kLeast>
inline vfloat exp_down_to(vfloat y) {
  static_assert(kLeast >= -87 && kLeast < 0, "the power of two below is that of a normal number");
  constexpr float kMagic = 0x1.8p23f;  // added, the nearest integer is in the last bits
  const vfloat shifted = y * 1.44269504f + kMagic;
  const vfloat n = shifted - kMagic;
  const vfloat r = y - n * 0.693359375f - n * -2.12194440e-4f;  // log 2 in two pieces
  vfloat p = vfloat{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const vuint32 power = (bits_of<vuint32>(shifted) - bits_of<uint32_t>(kMagic) + 127u) << 23;
  return y < static_cast<float>(kLeast) ? vfloat{} : p * bits_of<vfloat>(power);
}
template <int kLeast>
inline vdouble exp_down_to(vdouble y) {
  vdouble e{};
  for (int i = 0; i < kLanes<double>; ++i) e[i] = exp(y[i]);
  return e;
}

}  // namespace ela::ELA_ISA
