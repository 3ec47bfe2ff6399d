// The self-test's kernels as functions of the host; what a launch returns is a CUDA error code.
#pragma once

#include <cstddef>
#include <cstdint>

namespace selftest {

int reverse(const float* x, float* y, unsigned blocks, unsigned threads, size_t shared, bool with_barrier);
int rounds(const float* x, float* y, unsigned threads, int count, bool with_barrier);
int lanes(const float* x, float* y);
int misuse(int which, float* y, unsigned threads);
int raise_shared(int bytes);
int last_error();
void narrow_to_bfloat16(const float* x, void* y, int64_t count);
void narrow_to_half(const float* x, void* y, int64_t count);
void widen_bfloat16(const void* x, float* y, int64_t count);
void widen_half(const void* x, float* y, int64_t count);

}  // namespace selftest
