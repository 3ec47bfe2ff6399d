// What the kernels are written in: 16-byte vectors, conversion to float32, reductions over a warp, shared memory.
//
// Nothing here but plain loads and stores, barriers, and shuffles and votes of a warp with the full mask, so that the
// same source also runs on a CPU against a stand-in for the CUDA headers (tests/native/cuda_on_cpu).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__) && CUDART_VERSION < 12010
#error "the CUDA kernels of ela_kernels need CUDA 12.1 or later, for kernel parameters of more than 4 KB"
#endif

// The dynamic shared memory of the block, 16-byte aligned, as an array of `type`.
#ifdef __CUDACC__
#define ELA_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char ela_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(ela_dynamic_shared)
#else
#define ELA_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(cuda_on_cpu::dynamic_shared())
#endif

namespace ela::cuda {

constexpr int kBlock = 256;  // threads of every block
constexpr int kWarp = 32;
constexpr int kWarps = kBlock / kWarp;
constexpr unsigned kFullMask = 0xffffffffu;

template <int kBytes>
struct RawOf;
template <>
struct RawOf<16> {
  using Type = uint4;
};
template <>
struct RawOf<4> {
  using Type = unsigned int;
};
template <>
struct RawOf<2> {
  using Type = unsigned short;
};

// kVec elements as they lie in memory; converted only where they are used, so that half types take half the registers
// while they are in flight.
template <class T, int kVec>
using Raw = typename RawOf<sizeof(T) * kVec>::Type;

template <class T>
constexpr int kFullVector = 16 / static_cast<int>(sizeof(T));

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// Read past the coherent path: no kernel writes what it reads.
template <class T, int kVec>
__device__ inline Raw<T, kVec> load_vector(const T* ptr) {
  return __ldg(reinterpret_cast<const Raw<T, kVec>*>(ptr));
}

__device__ inline float float_of_bits(unsigned bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

template <class T, int kVec>
__device__ inline void unpack(Raw<T, kVec> raw, float (&x)[kVec]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16> && kVec > 1) {
    // A bfloat16 is the upper half of a float: one instruction each, where the library's conversion takes two for the
    // upper element of a word.
    unsigned words[kVec / 2];
    memcpy(words, &raw, sizeof(raw));
#pragma unroll
    for (int i = 0; i < kVec / 2; ++i) {
      x[2 * i] = float_of_bits(words[i] << 16);
      x[2 * i + 1] = float_of_bits(words[i] & 0xffff0000u);
    }
  } else {
    T elements[kVec];
    memcpy(elements, &raw, sizeof(raw));
#pragma unroll
    for (int i = 0; i < kVec; ++i) x[i] = to_float(elements[i]);
  }
}

template <class T, int kVec>
__device__ inline void store_vector(T* ptr, const float (&x)[kVec]) {
  T elements[kVec];
#pragma unroll
  for (int i = 0; i < kVec; ++i) elements[i] = from_float<T>(x[i]);
  Raw<T, kVec> raw;
  memcpy(&raw, elements, sizeof(raw));
  *reinterpret_cast<Raw<T, kVec>*>(ptr) = raw;
}

template <class T>
__device__ inline float load_scalar(const T* ptr) {
  float x[1];
  unpack<T, 1>(load_vector<T, 1>(ptr), x);
  return x[0];
}

// Sum over aligned runs of `lanes` lanes (a power of two), in a fixed order; every lane gets it.
__device__ inline float sum_lanes(float x, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kFullMask, x, step);
  return x;
}

__device__ inline float sum_warp(float x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kFullMask, x, step);
  return x;
}

__device__ inline float max_warp(float x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kFullMask, x, step));
  return x;
}

template <class I>
__host__ __device__ constexpr I ceil_div(I x, I y) {
  return (x + y - 1) / y;
}

template <class I>
__host__ __device__ constexpr I smaller(I x, I y) {
  return x < y ? x : y;
}

template <class I>
__host__ __device__ constexpr I larger(I x, I y) {
  return x < y ? y : x;
}

}  // namespace ela::cuda
