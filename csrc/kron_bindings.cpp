// Bindings of the ops on Kronecker factors.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <vector>

#include "bindings.h"
#include "fastcurv.h"

namespace py = pybind11;

namespace fastcurv {
namespace {

// A call of an op, read from its Python arguments.
struct Call {
  std::vector<Factor> factors;
  Dtype type;
  dlpack::Device device;
  KronArgs args = {};  // of the device kernel
};

Call read_call(const py::list& in, const py::list& out, const py::list& previous, const py::object& info,
               const py::object& damping) {
  const TensorView infos = view(info, "info"), dampings = view(damping, "damping");
  const auto count = static_cast<int64_t>(in.size());
  if (out.size() != in.size() || (previous.size() && previous.size() != in.size()) || infos.numel != count ||
      infos.dtype != kUnknownDtype || dampings.numel != count || dampings.dtype != static_cast<int>(Dtype::float64)) {
    throw py::value_error(
        "expected as many inverses, and elements of info (int32) and damping (float64), as factors, and as many "
        "previous ones or none");
  }
  Call call;
  call.device = infos.device;
  call.type = in.empty() ? Dtype::float32 : dtype(in, "factors");
  for (size_t i = 0; i < in.size(); ++i) {
    const TensorView from = view(in[i], "factors"), to = view(out[i], "inverses");
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
int shared_bytes(const Call& call) {
  const int item_size = call.type == Dtype::float64 ? 8 : 4;
  int bytes = 0;
  for (const Factor& f : call.factors) bytes = std::max(bytes, kron_inverse_bytes(f.n, item_size));
  if (bytes > kFactorBytes) {
    throw py::value_error("factors: expected at most " + std::to_string(most_rows(kFewRows, item_size)) +
                          " rows on a GPU");
  }
  return bytes;
}

void run(Call call) {
  if (call.device.type == dlpack::kCPU) {
    py::gil_scoped_release release;
    return kron_inverse_cpu(call.factors, call.type);
  }
#ifdef FASTCURV_HAS_CUDA
  const int bytes = shared_bytes(call);
  void* stream = current_stream(call.device.id);
  int error = 0;
  {
    py::gil_scoped_release release;
    for_each_batch(call.factors, call.args.factors, [&](int blocks) {
      if (!error) error = cuda_launch(kron_inverse_cuda(call.type), blocks, bytes, call.args, call.device.id, stream);
    });
  }
  if (error) throw std::runtime_error(std::string("kron_inverse: CUDA launch failed: ") + cuda_error_text(error));
#else
  throw std::runtime_error("kron_inverse: this build of fastcurv._C has no CUDA code; see README, Build for your GPU");
#endif
}

// The same call as kernels that somebody else launches: see plan() in bindings.cpp.
py::list plan(Call call) {
  const std::string name = std::string("fastcurv::kron_inverse_kernel<") + type_name(call.type) + ">";
  const int bytes = shared_bytes(call);
  py::list launches;
  for_each_batch(call.factors, call.args.factors, [&](int blocks) {
    launches.append(py::make_tuple(name, blocks, kMatrixThreads, kMatricesPerLaunch, bytes,
                                   py::bytes(reinterpret_cast<const char*>(&call.args), sizeof call.args)));
  });
  return launches;
}

}  // namespace

void bind_kron_ops(py::module_& module) {
  const auto def = [&](const char* name, const auto& function) {
    module.def(
        name,
        [function](const py::list& factors, const py::list& inverses, const py::list& previous, const py::object& info,
                   const py::object& damping) {
          return function(read_call(factors, inverses, previous, info, damping));
        },
        py::arg("factors"), py::arg("inverses"), py::arg("previous"), py::arg("info"), py::arg("damping"));
  };
  def("kron_inverse", &run);
  def("kron_inverse_kernel", &plan);
}

}  // namespace fastcurv
