#include <pybind11/pybind11.h>

#include "bind_runtime.h"
#include "selftest.h"

namespace {

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

}  // namespace

PYBIND11_MODULE(cuda_on_cpu_selftest, m) {
  cuda_on_cpu::bind_runtime(m);
  m.def("reverse", [](int64_t x, int64_t y, unsigned blocks, unsigned threads, size_t shared, bool with_barrier) {
    return selftest::reverse(pointer<const float>(x), pointer<float>(y), blocks, threads, shared, with_barrier);
  });
  m.def("rounds", [](int64_t x, int64_t y, unsigned threads, int count, bool with_barrier) {
    return selftest::rounds(pointer<const float>(x), pointer<float>(y), threads, count, with_barrier);
  });
  m.def("lanes", [](int64_t x, int64_t y) { return selftest::lanes(pointer<const float>(x), pointer<float>(y)); });
  m.def("misuse",
        [](int which, int64_t y, unsigned threads) { return selftest::misuse(which, pointer<float>(y), threads); });
  m.def("raise_shared", &selftest::raise_shared);
  m.def("last_error", &selftest::last_error);
  m.def("narrow_to_bfloat16", [](int64_t x, int64_t y, int64_t count) {
    selftest::narrow_to_bfloat16(pointer<const float>(x), pointer<void>(y), count);
  });
  m.def("narrow_to_half", [](int64_t x, int64_t y, int64_t count) {
    selftest::narrow_to_half(pointer<const float>(x), pointer<void>(y), count);
  });
  m.def("widen_bfloat16", [](int64_t x, int64_t y, int64_t count) {
    selftest::widen_bfloat16(pointer<const void>(x), pointer<float>(y), count);
  });
  m.def("widen_half", [](int64_t x, int64_t y, int64_t count) {
    selftest::widen_half(pointer<const void>(x), pointer<float>(y), count);
  });
}
