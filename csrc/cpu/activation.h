// Activations of a value and their slopes, a vector at a time.
#pragma once

#include <math.h>

#include "cpu/exponential.h"
#include "cpu/params.h"
#include "cpu/simd.h"

namespace ela::ELA_ISA {

// What an activation makes of a vector, and its derivative there; whichever is not used costs nothing.
template <class T>
struct Activated {
  Vec<T> value, slope;
};

// e^y of y <= 0, and 0 below -40: nothing that is added to a number near one, and gradients multiplied with less could
// be subnormal.
template <class V>
inline V exp_to_one(V y) {
  return exp_down_to<-40>(y);
}

// The normal distribution up to x, and what e^(-x^2 / 2) is there.
//
// In float from the smaller of its two sides, e^(-x^2 / 2) * g(|x|), where g is smooth: a polynomial in
// t = 1 / (1 + 0.35 |x|), fitted for the least relative error, 3.2e-8 up to |x| = 13. So a far negative x keeps its
// digits, which 1 + erf(x) does not.
inline vfloat normal_up_to(vfloat x, vfloat* density) {
  const vfloat e = exp_to_one(x * x * -0.5f);
  const vfloat t = 1.0f / (1.0f + 0.35f * (x < 0.0f ? -x : x));
  vfloat g = vfloat{} - 0.0290951037f;
  g = g * t + 0.143719585f;
  g = g * t - 0.255182335f;
  g = g * t + 0.158552434f;
  g = g * t - 0.0226708758f;
  g = g * t + 0.105316945f;
  g = g * t + 0.119882757f;
  g = g * t + 0.139854749f;
  g = g * t + 0.139621828f;
  const vfloat side = e * g * t;
  *density = e;
  return x < 0.0f ? side : 1.0f - side;
}
inline vdouble normal_up_to(vdouble x, vdouble* density) {
  vdouble up_to{};
  for (int i = 0; i < kLanes<double>; ++i) {
    up_to[i] = erfc(x[i] * -0.70710678118654752440) / 2;
    (*density)[i] = exp(x[i] * x[i] / -2);
  }
  return up_to;
}

// x times the normal distribution up to x.
template <class T>
struct Gelu {
  static Activated<T> of(Vec<T> x) {
    constexpr Acc<T> kInverseRoot = static_cast<Acc<T>>(0.39894228040143267794);  // 1 / sqrt(2 pi)
    Vec<T> density{};
    const Vec<T> up_to = normal_up_to(x, &density);
    return {x * up_to, up_to + x * density * kInverseRoot};
  }
};

// x (1 + tanh(w / 2)) / 2 = x / (1 + e^-w), w = 2 sqrt(2 / pi) (x + 0.044715 x^3).
template <class T>
struct GeluTanh {
  static Activated<T> of(Vec<T> x) {
    constexpr Acc<T> kRoot = static_cast<Acc<T>>(1.59576912160573071176), kCube = static_cast<Acc<T>>(0.044715);
    // Beyond this both sides are constant, and a cube could overflow.
    constexpr Acc<T> kEnd = 30;
    const Vec<T> end = Vec<T>{} + kEnd, one = Vec<T>{} + 1;
    Vec<T> inner = x > end ? end : x;
    inner = inner < -end ? -end : inner;
    const Vec<T> square = inner * inner, w = kRoot * inner * (one + kCube * square);
    const Vec<T> e = exp_to_one(w < Vec<T>{} ? w : -w), whole = one / (one + e);
    const Vec<T> gate = w < Vec<T>{} ? e * whole : whole;
    return {x * gate, gate + x * e * whole * whole * kRoot * (one + 3 * kCube * square)};
  }
};

// Calls body with the activation of a kind that is one.
template <class T, class Body>
inline void by_activation(Activation kind, Body body) {
  kind == Activation::kGelu ? body(Gelu<T>{}) : body(GeluTanh<T>{});
}

}  // namespace ela::ELA_ISA
