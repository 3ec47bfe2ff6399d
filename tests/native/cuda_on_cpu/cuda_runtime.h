// A stand-in for the CUDA runtime's header, for tests alone: kernels are compiled by the host compiler, and a block's
// threads run as fibers in one thread of the operating system. It has what the kernels of this project use, and what a
// real device would leave undefined (a barrier that some threads never reach, a shuffle from a lane that takes no part,
// a misaligned vector) is an error with a message.
//
// Kernels take shared memory through ELA_DYNAMIC_SHARED. There is no __shared__ here: memory of that kind would neither
// be poisoned for each block nor end where the sanitizer can see it.
#pragma once

#include <math.h>
#include <string.h>

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#define CUDART_VERSION 13000

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

typedef struct CUstream_st* cudaStream_t;

namespace cuda_on_cpu {

// Limits of a launch, the smallest of all architectures since 7.5 with kernel parameters of 32 764 bytes (7.0).
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxShared = 64 * 1024;      // after cudaFuncSetAttribute; 7.5 has the least
constexpr size_t kDefaultShared = 48 * 1024;  // before
constexpr size_t kMaxParameterBytes = 32764;

// Where the running thread stands; set whenever a fiber is switched to.
extern uint3 thread_index, block_index;
extern dim3 block_size, grid_size;

// The running block's shared memory, of exactly the bytes that the launch asked for.
void* dynamic_shared();

// A place in the source, for messages.
struct Site {
  const char* what;
  const char* file;
  int line;
};

void wait_for_block(const Site& site);

// Waits for all lanes of `mask`. Every lane gives `value`, and gets that of lane `source`, which is one of `mask`.
uint64_t exchange(const Site& site, unsigned mask, uint64_t value, int source);

// Waits for all lanes of `mask`; the lanes whose `flag` is set.
unsigned vote(const Site& site, unsigned mask, bool flag);

[[noreturn]] void misuse(const Site& site, const char* problem);

cudaError_t set_max_shared(const void* kernel, int bytes);

struct Launch {
  const void* kernel;
  dim3 grid, block;
  size_t shared;
  void (*run_thread)(const void* bound);
  const void* bound;  // the kernel and a copy of its arguments
};
cudaError_t launch(const Launch& launch);

template <class... Parameters>
struct Bound {
  void (*kernel)(Parameters...);
  std::tuple<std::decay_t<Parameters>...> arguments;
  static void run_thread(const void* bound) {
    const Bound& b = *static_cast<const Bound*>(bound);
    std::apply(b.kernel, b.arguments);
  }
};

template <class... Parameters, size_t... kIndex>
cudaError_t launch_bound(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments, size_t shared,
                         std::index_sequence<kIndex...>) {
  static_assert((sizeof(Parameters) + ... + 0) <= kMaxParameterBytes, "a kernel's parameters are too large");
  const Bound<Parameters...> bound = {kernel, {*static_cast<std::decay_t<Parameters>*>(arguments[kIndex])...}};
  return launch(
      {reinterpret_cast<const void*>(kernel), grid, block, shared, &Bound<Parameters...>::run_thread, &bound});
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>, "lanes exchange up to 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  return bits;
}

inline int lane() {
  return static_cast<int>((thread_index.x + block_size.x * (thread_index.y + block_size.y * thread_index.z)) % 32);
}

template <class T>
T shuffle(const Site& site, unsigned mask, T value, int source) {
  return from_bits<T>(exchange(site, mask, to_bits(value), source));
}

inline int run_of(const Site& site, int width) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) misuse(site, "the width is no power of two up to 32");
  return lane() & ~(width - 1);
}

template <class T>
T load(const Site& site, const T* ptr) {
  if (reinterpret_cast<uintptr_t>(ptr) % alignof(T) != 0) misuse(site, "the address is not aligned to the type's size");
  return *ptr;
}

}  // namespace cuda_on_cpu

#define threadIdx cuda_on_cpu::thread_index
#define blockIdx cuda_on_cpu::block_index
#define blockDim cuda_on_cpu::block_size
#define gridDim cuda_on_cpu::grid_size

// Default arguments, so that a message names the caller's line.
#define CUDA_ON_CPU_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CUDA_ON_CPU_SITE) { cuda_on_cpu::wait_for_block({"__syncthreads", file, line}); }

inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::vote({"__syncwarp", file, line}, mask, false);
}

inline unsigned __ballot_sync(unsigned mask, int flag, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::vote({"__ballot_sync", file, line}, mask, flag != 0);
}

inline int __any_sync(unsigned mask, int flag, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::vote({"__any_sync", file, line}, mask, flag != 0) != 0;
}

inline int __all_sync(unsigned mask, int flag, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::vote({"__all_sync", file, line}, mask, flag != 0) == mask;
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_ON_CPU_SITE) {
  const cuda_on_cpu::Site site = {"__shfl_sync", file, line};
  return cuda_on_cpu::shuffle(site, mask, value, cuda_on_cpu::run_of(site, width) + (source & (width - 1)));
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, CUDA_ON_CPU_SITE) {
  const cuda_on_cpu::Site site = {"__shfl_xor_sync", file, line};
  const int end = cuda_on_cpu::run_of(site, width) + width;
  const int lane = cuda_on_cpu::lane();
  const int source = lane ^ lane_mask;
  return cuda_on_cpu::shuffle(site, mask, value, source < end ? source : lane);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_SITE) {
  const cuda_on_cpu::Site site = {"__shfl_down_sync", file, line};
  const int end = cuda_on_cpu::run_of(site, width) + width;
  const int lane = cuda_on_cpu::lane();
  const int source = lane + static_cast<int>(delta);
  return cuda_on_cpu::shuffle(site, mask, value, source < end ? source : lane);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_SITE) {
  const cuda_on_cpu::Site site = {"__shfl_up_sync", file, line};
  const int begin = cuda_on_cpu::run_of(site, width);
  const int lane = cuda_on_cpu::lane();
  const int source = lane - static_cast<int>(delta);
  return cuda_on_cpu::shuffle(site, mask, value, source >= begin ? source : lane);
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

template <class T>
T __ldg(const T* ptr, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::load({"__ldg", file, line}, ptr);
}

template <class... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments, size_t shared = 0,
                             cudaStream_t = nullptr) {
  return cuda_on_cpu::launch_bound(kernel, grid, block, arguments, shared, std::index_sequence_for<Parameters...>());
}

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int bytes) {
  return cuda_on_cpu::set_max_shared(reinterpret_cast<const void*>(kernel), bytes);
}

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetLastError();
const char* cudaGetErrorName(cudaError_t code);
const char* cudaGetErrorString(cudaError_t code);
