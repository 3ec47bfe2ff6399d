// The project's CUDA kernels behind their own binding, as a module that runs them on the CPU.
#include "bind_runtime.h"

void bind_cuda(pybind11::module_& module);

PYBIND11_MODULE(cuda_on_cpu, module) {
  module.doc() = "The CUDA kernels of ela_kernels, run on the CPU.";
  module.attr("has_cuda") = true;
  bind_cuda(module);
  cuda_on_cpu::bind_runtime(module);
}
