#include "tensor_view.h"

#include <pybind11/stl.h>

#include <string>

namespace py = pybind11;

namespace fastcurv {
namespace {

constexpr uint32_t kDlpackMajor = 1;

struct Torch {
  PyTypeObject* tensor = nullptr;
  const dlpack::ExchangeApi* offered = nullptr;
  const dlpack::ExchangeApi* api = nullptr;

  Torch() {
    py::object type = py::module_::import("torch").attr("Tensor");
    tensor = reinterpret_cast<PyTypeObject*>(type.ptr());
    Py_INCREF(type.ptr());  // for the life of the process
    if (!py::hasattr(type, "__dlpack_c_exchange_api__")) return;
    py::object capsule = type.attr("__dlpack_c_exchange_api__");
    auto* header = static_cast<dlpack::ExchangeHeader*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!header) PyErr_Clear();
    while (header && header->version.major > kDlpackMajor) header = header->previous;
    auto* candidate = reinterpret_cast<const dlpack::ExchangeApi*>(header);
    if (header && header->version.major == kDlpackMajor && candidate->to_tensor) offered = api = candidate;
  }
};

Torch& torch() {
  static Torch* instance = new Torch;  // never destroyed: it outlives the interpreter's modules
  return *instance;
}

int dtype_code(dlpack::DataType type) {
  if (type.lanes != 1) return kUnknownDtype;
  if (type.code == dlpack::kBfloat && type.bits == 16) return static_cast<int>(Dtype::bfloat16);
  if (type.code != dlpack::kFloat) return kUnknownDtype;
  if (type.bits == 32) return static_cast<int>(Dtype::float32);
  if (type.bits == 64) return static_cast<int>(Dtype::float64);
  return type.bits == 16 ? static_cast<int>(Dtype::float16) : kUnknownDtype;
}

int dtype_code(const std::string& name) {
  static const char* const names[] = {"torch.float32", "torch.float64", "torch.bfloat16", "torch.float16"};
  for (int code = 0; code < 4; ++code) {
    if (name == names[code]) return code;
  }
  return kUnknownDtype;
}

bool view_by_attributes(PyObject* object, TensorView& view) {
  try {
    py::handle tensor(object);
    if (py::str(tensor.attr("layout")).cast<std::string>() != "torch.strided") return false;
    view.pointer = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
    view.storage = tensor.attr("shape").cast<std::vector<int64_t>>();
    view.ndim = static_cast<int>(view.storage.size());
    const auto strides = tensor.attr("stride")().cast<std::vector<int64_t>>();
    view.storage.insert(view.storage.end(), strides.begin(), strides.end());
    view.dtype = dtype_code(py::str(tensor.attr("dtype")).cast<std::string>());
    const py::object device = tensor.attr("device");
    const auto type = device.attr("type").cast<std::string>();
    view.device.type = type == "cpu" ? dlpack::kCPU : type == "cuda" ? dlpack::kCUDA : 0;
    view.device.id = device.attr("index").is_none() ? 0 : device.attr("index").cast<int>();
    return true;
  } catch (const std::exception&) {  // no pointer, strides or known device: no tensor for a kernel
    return false;
  }
}

}  // namespace

bool is_tensor(PyObject* object) { return PyObject_TypeCheck(object, torch().tensor); }

bool view_tensor(PyObject* object, TensorView& view) {
  if (!is_tensor(object)) return false;
  if (const auto* api = torch().api) {
    dlpack::Tensor tensor;
    if (api->to_tensor(object, &tensor) != 0) {
      PyErr_Clear();
      return false;
    }
    view.pointer = static_cast<char*>(tensor.data) + tensor.byte_offset;
    view.ndim = tensor.ndim;
    view.dtype = dtype_code(tensor.dtype);
    view.device = tensor.device;
    view.shape = tensor.shape;
    view.strides = tensor.strides;
  } else {
    if (!view_by_attributes(object, view)) return false;
    view.shape = view.storage.data();
    view.strides = view.storage.data() + view.ndim;
  }
  view.numel = 1;
  for (int d = 0; d < view.ndim; ++d) view.numel *= view.shape[d];
  return view.pointer || view.numel == 0;  // else a tensor without memory: of zeros that autograd left out, say
}

void* current_stream(int device) {
  if (const auto* api = torch().api) {
    void* stream = nullptr;
    if (api->current_stream(dlpack::kCUDA, device, &stream) != 0) throw py::error_already_set();
    return stream;
  }
  const py::object stream = py::module_::import("torch").attr("cuda").attr("current_stream")(device);
  return reinterpret_cast<void*>(stream.attr("cuda_stream").cast<uintptr_t>());
}

bool exchange_api() { return torch().api != nullptr; }

void set_exchange_api(bool enabled) { torch().api = enabled ? torch().offered : nullptr; }

}  // namespace fastcurv
