// Python's view of the stand-in runtime.
#pragma once

#include <pybind11/pybind11.h>

#include "runtime.h"

namespace cuda_on_cpu {

inline void bind_runtime(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("set_order", &set_order, py::arg("order"),
        "The order of blocks and threads: 0 ascending, 1 descending, any other a seed (see runtime.h).");
  m.def("limit_grid", &limit_grid, py::arg("blocks"), "Blocks that a grid has at most along x; 0 is no limit.");
  m.def("device_now", &device_now, "The device that is current in the runtime.");
  m.def(
      "take_launches",
      [] {
        const auto sizes = [](const dim3& d) { return py::make_tuple(d.x, d.y, d.z); };
        py::list found;
        for (const LaunchRecord& r : take_launches()) {
          found.append(py::make_tuple(r.kernel, sizes(r.grid), sizes(r.block), r.shared));
        }
        return found;
      },
      "The launches since the last call, each (kernel, grid, block, bytes of shared memory).");
}

}  // namespace cuda_on_cpu
