// The extension module. It knows nothing of PyTorch: it takes pointers, sizes and strides, and
// returns error codes.
#include <pybind11/pybind11.h>

namespace py = pybind11;

void bind_cpu(py::module_& module);
#ifdef ELA_WITH_CUDA
void bind_cuda(py::module_& module);
#endif

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled kernels of ela_kernels.";
  bind_cpu(module);
#ifdef ELA_WITH_CUDA
  bind_cuda(module);
  module.attr("has_cuda") = true;
#else
  module.attr("has_cuda") = false;
#endif
}
