// The CUDA devices, and all of the CUDA part of the module; left out of a build without nvcc.
#include <pybind11/pybind11.h>

#include <string>

#include "cuda/common/device_query.h"

namespace py = pybind11;

namespace {

std::string describe(int code) {
  return "error " + std::to_string(code) + " (" + ela::cuda::error_name(code) + "): " + ela::cuda::error_text(code);
}

py::dict cuda_devices() {
  py::list devices;
  py::dict report;
  report["devices"] = devices;
  int count = 0;
  int code = ela::cuda::count_devices(&count);
  for (int device = 0; code == 0 && device < count; ++device) {
    ela::cuda::DeviceProperties properties;
    code = ela::cuda::query_device(device, &properties);
    if (code != 0) break;
    py::dict entry;
    entry["index"] = device;
    entry["name"] = std::string(properties.name);
    entry["capability"] = py::make_tuple(properties.capability_major, properties.capability_minor);
    entry["multiprocessors"] = properties.multiprocessors;
    entry["total_memory"] = properties.total_memory;
    devices.append(entry);
  }
  report["code"] = code;
  report["problem"] = code == 0 ? py::object(py::none()) : py::object(py::str(describe(code)));
  return report;
}

py::tuple cuda_increment(int device, int value) {
  int result = 0;
  int code = 0;
  {
    py::gil_scoped_release release;
    code = ela::cuda::launch_increment(device, value, &result);
  }
  return py::make_tuple(code, result);
}

}  // namespace

void bind_cuda_attention(py::module_& module);
void bind_cuda_layer(py::module_& module);
void bind_cuda_norm(py::module_& module);
void bind_cuda_position(py::module_& module);
void bind_cuda_producer(py::module_& module);

void bind_cuda(py::module_& module) {
  module.def("cuda_devices", &cuda_devices,
             "The CUDA devices as a dict of `devices`, `code` (0 for success) and `problem`.");
  module.def("cuda_increment", &cuda_increment, py::arg("device"), py::kw_only(), py::arg("value"),
             "Launches a kernel on `device` that computes `value + 1`; returns (error code, result).");
  module.def("cuda_error", &describe, py::arg("code"), "A CUDA error code in words.");
  module.def("cuda_runtime_version", &ela::cuda::runtime_version,
             "The version of the CUDA runtime linked in, e.g. 13000 for 13.0.");
  bind_cuda_attention(module);
  bind_cuda_layer(module);
  bind_cuda_norm(module);
  bind_cuda_position(module);
  bind_cuda_producer(module);
}
