// Bindings of the ops on Kronecker factors.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <vector>

#include "bindings.h"
#include "fastcurv.h"

namespace py = pybind11;

namespace fastcurv::kron_ops {
namespace {

// An op on damped factors.
struct KronOp {
  const char* name;
  void (*run)(const std::vector<Factor>& factors, Dtype type, long long p);
  int (*shared_bytes)(long long n, long long item_size);  // of dynamic memory that the device kernel wants
  long long (*most_rows)(long long item_size);            // that it takes
#ifdef FASTCURV_HAS_CUDA
  CudaKronKernel (*kernel)(Dtype type);
#endif
};

// A call of one, read from its Python arguments.
struct Call {
  std::vector<Factor> factors;
  Dtype type;
  dlpack::Device device;
  KronArgs args = {};  // of the device kernel
};

Call read_call(const py::list& in, const py::list& out, const char* out_name, const py::list& previous,
               const py::object& info, const py::object& damping, long long p) {
  const TensorView infos = view(info, "info"), dampings = view(damping, "damping");
  const auto count = static_cast<int64_t>(in.size());
  if (out.size() != in.size() || (previous.size() && previous.size() != in.size()) || infos.numel != count ||
      infos.dtype != kUnknownDtype || dampings.numel != count || dampings.dtype != static_cast<int>(Dtype::float64)) {
    throw py::value_error(
        "expected as many results, and elements of info (int32) and damping (float64), as factors, and as many "
        "previous ones or none");
  }
  if (p < 1) throw py::value_error("p: expected 1 or more, got " + std::to_string(p));
  Call call;
  call.args.p = p;
  call.device = infos.device;
  call.type = in.empty() ? Dtype::float32 : dtype(in, "factors");
  for (size_t i = 0; i < in.size(); ++i) {
    const TensorView from = view(in[i], "factors"), to = view(out[i], out_name);
    const TensorView old = previous.empty() ? to : view(previous[i], "previous");
    for (const TensorView* v : {&from, &to, &old}) {
      if (v->ndim != 2 || v->shape[0] != from.shape[0] || v->shape[1] != from.shape[0] ||
          v->dtype != static_cast<int>(call.type) || v->device.type != call.device.type ||
          v->device.id != call.device.id || dampings.device.type != call.device.type) {
        throw py::value_error("expected contiguous square matrices of one dtype, on the device of info and damping");
      }
    }
    call.factors.push_back({from.pointer, previous.empty() ? nullptr : old.pointer, to.pointer,
                            static_cast<int*>(infos.pointer) + i, static_cast<const double*>(dampings.pointer) + i,
                            from.shape[0]});
  }
  if (call.type != Dtype::float32 && call.type != Dtype::float64) {
    throw py::type_error("factors: expected float32 or float64");
  }
  return call;
}

// Bytes of dynamic shared memory of the device kernel.
int shared_bytes(const KronOp& op, const Call& call) {
  const int item_size = call.type == Dtype::float64 ? 8 : 4;
  int bytes = 0;
  for (const Factor& f : call.factors) {
    if (f.n > op.most_rows(item_size)) {
      throw py::value_error("factors: expected at most " + std::to_string(op.most_rows(item_size)) + " rows on a GPU");
    }
    bytes = std::max(bytes, op.shared_bytes(f.n, item_size));
  }
  return bytes;
}

// Whether all are contiguous square matrices of one dtype, float32 or float64, on one CPU or NVIDIA GPU.
bool are_square(const py::list& matrices) {
  TensorView first;
  for (size_t i = 0; i < matrices.size(); ++i) {
    TensorView v;
    if (!view_tensor(matrices[i].ptr(), v) || v.ndim != 2 || v.shape[0] != v.shape[1]) return false;
    if (v.shape[0] > 1 && (v.strides[1] != 1 || v.strides[0] != v.shape[0])) return false;
    if (i == 0) {
      if (v.dtype != static_cast<int>(Dtype::float32) && v.dtype != static_cast<int>(Dtype::float64)) return false;
      if (v.device.type != dlpack::kCPU && v.device.type != dlpack::kCUDA) return false;
      first = v;
    } else if (v.dtype != first.dtype || v.device.type != first.device.type || v.device.id != first.device.id) {
      return false;
    }
  }
  return true;
}

void run(const KronOp& op, Call call) {
  if (call.device.type == dlpack::kCPU) {
    py::gil_scoped_release release;
    return op.run(call.factors, call.type, call.args.p);
  }
#ifdef FASTCURV_HAS_CUDA
  const int bytes = shared_bytes(op, call);
  void* stream = current_stream(call.device.id);
  int error = 0;
  {
    py::gil_scoped_release release;
    for_each_batch(call.factors, call.args.factors, [&](int blocks) {
      if (!error) error = cuda_launch(op.kernel(call.type), blocks, bytes, call.args, call.device.id, stream);
    });
  }
  if (error) throw std::runtime_error(std::string(op.name) + ": CUDA launch failed: " + cuda_error_text(error));
#else
  throw std::runtime_error(std::string(op.name) +
                           ": this build of fastcurv._C has no CUDA code; see README, Build for your GPU");
#endif
}

// The same call as kernels that somebody else launches: see plan() in bindings.cpp.
py::list plan(const KronOp& op, Call call) {
  const std::string name = std::string("fastcurv::") + op.name + "_kernel<" + type_name(call.type) + ">";
  const int bytes = shared_bytes(op, call);
  py::list launches;
  for_each_batch(call.factors, call.args.factors, [&](int blocks) {
    launches.append(py::make_tuple(name, blocks, kMatrixThreads, kMatricesPerLaunch, bytes,
                                   py::bytes(reinterpret_cast<const char*>(&call.args), sizeof call.args)));
  });
  return launches;
}

}  // namespace

void bind(py::module_& module) {
  static const KronOp inverse = {
      "kron_inverse",
      [](const std::vector<Factor>& factors, Dtype type, long long) { kron_inverse_cpu(factors, type); },
      [](long long n, long long item_size) { return kron_inverse_bytes(n, item_size); },
      [](long long item_size) { return most_rows(kFewRows, item_size); },
#ifdef FASTCURV_HAS_CUDA
      kron_inverse_cuda,
#endif
  };
  static const KronOp root = {
      "kron_root",
      kron_root_cpu,
      [](long long n, long long) { return newton_schulz_bytes(n); },
      [](long long) { return kLargestSmall; },
#ifdef FASTCURV_HAS_CUDA
      kron_root_cuda,
#endif
  };
  const auto def = [&](const std::string& name, auto function) {
    module.def(("kron_inverse" + name).c_str(),
               [function](const py::list& factors, const py::list& inverses, const py::list& previous,
                          const py::object& info, const py::object& damping) {
                 return function(inverse, read_call(factors, inverses, "inverses", previous, info, damping, 1));
               },
               py::arg("factors"), py::arg("inverses"), py::arg("previous"), py::arg("info"), py::arg("damping"));
    module.def(("kron_root" + name).c_str(),
               [function](const py::list& factors, const py::list& roots, const py::list& previous,
                          const py::object& info, const py::object& damping, long long p) {
                 return function(root, read_call(factors, roots, "roots", previous, info, damping, p));
               },
               py::arg("factors"), py::arg("roots"), py::arg("previous"), py::arg("info"), py::arg("damping"),
               py::arg("p"));
  };
  module.def("are_square", &are_square, py::arg("matrices"));
  def("", run);
  def("_kernel", plan);
}

}  // namespace fastcurv::kron_ops
