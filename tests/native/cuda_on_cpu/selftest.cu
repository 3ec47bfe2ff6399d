// Small kernels that show what the stand-in runtime does, and what it refuses.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "selftest.h"

namespace selftest {

// Every block turns its part of x around, through shared memory.
__global__ void reverse_kernel(const float* x_ptr, float* y_ptr, bool with_barrier) {
  float* shared = static_cast<float*>(cuda_on_cpu::dynamic_shared());
  const unsigned first = blockIdx.x * blockDim.x;
  shared[threadIdx.x] = x_ptr[first + threadIdx.x];
  if (with_barrier) __syncthreads();
  y_ptr[first + threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

// y[r * blockDim + t] = sum of x[r * blockDim ...] over all threads, through one row of shared memory for every round.
__global__ void rounds_kernel(const float* x_ptr, float* y_ptr, int rounds, bool with_barrier) {
  float* shared = static_cast<float*>(cuda_on_cpu::dynamic_shared());
  for (int r = 0; r < rounds; ++r) {
    const unsigned at = r * blockDim.x + threadIdx.x;
    const float x = __shfl_xor_sync(0xffffffffu, x_ptr[at], 1);
    shared[threadIdx.x] = x;
    __syncthreads();
    float sum = 0;
    for (unsigned i = 0; i < blockDim.x; ++i) sum += shared[i];
    y_ptr[at] = sum;
    if (with_barrier) __syncthreads();
  }
}

// One row for each shuffle and vote, of all lanes of one warp.
__global__ void lanes_kernel(const float* x_ptr, float* y_ptr) {
  const int lane = threadIdx.x;
  const float x = x_ptr[lane];
  float* y = y_ptr + lane;
  y[0] = __shfl_sync(0xffffffffu, x, 3);
  y[32] = __shfl_sync(0xffffffffu, x, lane + 1, 8);
  y[64] = __shfl_xor_sync(0xffffffffu, x, 5);
  y[96] = __shfl_xor_sync(0xffffffffu, x, 5, 4);
  y[128] = __shfl_up_sync(0xffffffffu, x, 3u);
  y[160] = __shfl_up_sync(0xffffffffu, x, 3u, 8);
  y[192] = __shfl_down_sync(0xffffffffu, x, 3u);
  y[224] = __shfl_down_sync(0xffffffffu, x, 3u, 8);
  y[256] = static_cast<float>(__ballot_sync(0xffffffffu, lane == 4 || lane == 9));
  y[288] = static_cast<float>(__any_sync(0xffffffffu, lane == 7) + 2 * __all_sync(0xffffffffu, lane != 7));
  // Half of a warp by itself, while the other half goes on.
  if (lane < 16) y[320] = __shfl_xor_sync(0x0000ffffu, x, 1);
  if (lane >= 16) y[320] = __shfl_xor_sync(0xffff0000u, x, 2);
  __syncwarp();
}

enum Misuse {
  kLeaveBeforeBarrier,
  kBarrierInBranches,
  kShuffleInBranches,
  kShuffleAfterLeaving,
  kLaneNotInMask,
  kSourceNotInMask,
  kMisalignedVector,
  kBeyondSharedMemory,
  kBeyondArray,
  kMisalignedStore,
};

__global__ void misuse_kernel(int which, float* y_ptr) {
  float* shared = static_cast<float*>(cuda_on_cpu::dynamic_shared());
  const unsigned t = threadIdx.x;
  switch (which) {
    case kLeaveBeforeBarrier:
      if (t >= 40) return;
      __syncthreads();
      break;
    case kBarrierInBranches:
      if (t % 2 == 0) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case kShuffleInBranches:
      if (t < 20) {
        y_ptr[t] = __shfl_xor_sync(0xffffffffu, y_ptr[t], 1);
      } else {
        y_ptr[t] = __shfl_xor_sync(0xffffffffu, y_ptr[t], 1);
      }
      break;
    case kShuffleAfterLeaving:
      if (t == 5) return;
      y_ptr[t] = __shfl_xor_sync(0xffffffffu, y_ptr[t], 1);
      break;
    case kLaneNotInMask:
      y_ptr[t] = __shfl_xor_sync(0x0000ffffu, y_ptr[t], 1);
      break;
    case kSourceNotInMask:
      if (t < 16) y_ptr[t] = __shfl_xor_sync(0x0000ffffu, y_ptr[t], 16);
      break;
    case kMisalignedVector:
      y_ptr[t] = __ldg(reinterpret_cast<const float4*>(y_ptr + 1)).x;
      break;
    case kBeyondSharedMemory:
      shared[t + 1] = 1;
      break;
    case kBeyondArray:
      y_ptr[64] = 1;
      break;
    case kMisalignedStore:
      *reinterpret_cast<float4*>(y_ptr + 1) = {};
      break;
  }
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, Arguments... arguments) {
  void* addresses[] = {&arguments...};
  return cudaLaunchKernel(kernel, grid, block, addresses, shared);
}

int reverse(const float* x, float* y, unsigned blocks, unsigned threads, size_t shared, bool with_barrier) {
  return launch(&reverse_kernel, blocks, threads, shared, x, y, with_barrier);
}

int rounds(const float* x, float* y, unsigned threads, int count, bool with_barrier) {
  return launch(&rounds_kernel, 1, threads, threads * sizeof(float), x, y, count, with_barrier);
}

int lanes(const float* x, float* y) { return launch(&lanes_kernel, 1, 32, 0, x, y); }

int misuse(int which, float* y, unsigned threads) {
  return launch(&misuse_kernel, 1, threads, threads * sizeof(float), which, y);
}

int raise_shared(int bytes) {
  return cudaFuncSetAttribute(&reverse_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

int last_error() { return cudaGetLastError(); }

void narrow_to_bfloat16(const float* x, void* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) static_cast<__nv_bfloat16*>(y)[i] = __float2bfloat16_rn(x[i]);
}

void narrow_to_half(const float* x, void* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) static_cast<__half*>(y)[i] = __float2half_rn(x[i]);
}

void widen_bfloat16(const void* x, float* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] = __bfloat162float(static_cast<const __nv_bfloat16*>(x)[i]);
}

void widen_half(const void* x, float* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] = __half2float(static_cast<const __half*>(x)[i]);
}

}  // namespace selftest
