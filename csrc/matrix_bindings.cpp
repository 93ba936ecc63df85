// Bindings of the ops that do something with each matrix of a list.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <exception>
#include <string>
#include <vector>

#include "bindings.h"
#include "fastcurv.h"

namespace py = pybind11;

namespace fastcurv::matrix_ops {
namespace {

// A call of one of the ops, read from its Python arguments.
struct Call {
  std::vector<Matrix> matrices;
  std::vector<Step> steps;
  Dtype type;
  dlpack::Device device;
  MatrixArgs args = {};  // of the device kernel: complete but for matrices and steps

  bool is_on_cpu() const { return device.type == dlpack::kCPU; }
  long long small() const {
    long long small = 0;
    for (const Matrix& m : matrices) small = std::max(small, m.small());
    return small;
  }
};

Call read_call(const py::list& in, const py::list& out, const py::object& info) {
  const TensorView infos = view(info, "info");
  if (in.size() != out.size() || infos.numel != static_cast<int64_t>(in.size()) || infos.dtype != kUnknownDtype) {
    throw py::value_error("expected as many outputs, and elements of an int32 tensor, as matrices");
  }
  Call call;
  call.device = infos.device;
  call.type = in.empty() ? Dtype::float32 : dtype(in, "matrices");
  const auto is_here = [&](const TensorView& v) {
    return v.device.type == call.device.type && v.device.id == call.device.id;
  };
  for (size_t i = 0; i < in.size(); ++i) {
    const TensorView from = view(in[i], "matrices"), to = view(out[i], "outs");
    if (from.ndim != 2 || to.numel != from.numel || from.dtype != static_cast<int>(call.type) ||
        to.dtype != from.dtype || !is_here(from) || !is_here(to)) {
      throw py::value_error("expected contiguous matrices of one dtype and device, and outputs and info like them");
    }
    call.matrices.push_back(
        {from.pointer, to.pointer, static_cast<int*>(infos.pointer) + i, from.shape[0], from.shape[1]});
  }
  return call;
}

Call read_gram_schmidt(const py::list& in, const py::list& out, const py::object& info, double floor) {
  Call call = read_call(in, out, info);
  call.args.floor = floor;
  return call;
}

Call read_newton_schulz(const py::list& in, const py::list& out, const py::object& info,
                        const std::vector<std::array<double, 3>>& coefficients, const py::object&, long long spectral,
                        double eps) {
  Call call = read_call(in, out, info);
  for (const auto& c : coefficients) call.steps.push_back({c[0], c[1], c[2]});
  call.args.spectral = spectral;
  call.args.floor = eps;
  return call;
}

void run_polar_cpu(const Call& call) { polar_cpu(call.matrices, call.type); }
void run_gram_schmidt_cpu(const Call& call) { gram_schmidt_cpu(call.matrices, call.type, call.args.floor); }
void run_newton_schulz_cpu(const Call& call) {
  newton_schulz_cpu(call.matrices, call.type, call.steps, call.args.spectral, call.args.floor);
}

// What only the device kernel has to be told, or cannot do. Returns the bytes of dynamic shared memory.
int prepare_gram_schmidt(Call& call) {
  if (call.type != Dtype::float32 && call.type != Dtype::float64) {
    throw py::type_error("matrices: expected float32 or float64 on a GPU");
  }
  return 0;
}
int prepare_newton_schulz(Call& call) {
  if (call.small() > kLargestSmall || call.steps.size() > kMostSteps) {
    throw py::value_error("expected at most " + std::to_string(kLargestSmall) + " rows, or columns, and " +
                          std::to_string(kMostSteps) + " steps on a GPU");
  }
  std::copy(call.steps.begin(), call.steps.end(), call.args.steps);
  call.args.count = static_cast<long long>(call.steps.size());
  return newton_schulz_bytes(call.small());
}

struct MatrixOp {
  const char* name;
  void (*cpu)(const Call& call);
  int (*prepare)(Call& call) = nullptr;  // null: no device kernel
#ifdef FASTCURV_HAS_CUDA
  CudaMatrixKernel (*cuda)(Dtype dtype) = nullptr;
#endif
};

#ifdef FASTCURV_HAS_CUDA
#define AND_CUDA(name) , &name##_cuda
#else
#define AND_CUDA(name)
#endif
const MatrixOp kPolar = {"polar", &run_polar_cpu};
const MatrixOp kGramSchmidt = {"gram_schmidt", &run_gram_schmidt_cpu, &prepare_gram_schmidt AND_CUDA(gram_schmidt)};
const MatrixOp kNewtonSchulz = {"newton_schulz", &run_newton_schulz_cpu,
                                &prepare_newton_schulz AND_CUDA(newton_schulz)};

void run(const MatrixOp& op, Call call) {
  if (call.is_on_cpu()) {
    py::gil_scoped_release release;
    return op.cpu(call);
  }
#ifdef FASTCURV_HAS_CUDA
  if (!op.prepare) throw py::value_error(std::string(op.name) + ": has no CUDA kernel");
  const int shared_bytes = op.prepare(call);
  void* stream = current_stream(call.device.id);
  int error = 0;
  {
    py::gil_scoped_release release;
    for_each_batch(call.matrices, call.args.matrices, [&](int blocks) {
      if (!error) error = cuda_launch(op.cuda(call.type), blocks, shared_bytes, call.args, call.device.id, stream);
    });
  }
  if (error) throw std::runtime_error(std::string(op.name) + ": CUDA launch failed: " + cuda_error_text(error));
#else
  throw std::runtime_error(std::string(op.name) +
                           ": this build of fastcurv._C has no CUDA code; see README, Build for your GPU");
#endif
}

// The same call as kernels that somebody else launches: see plan() in bindings.cpp. One multiprocessor may get all
// blocks, for each has a matrix of its own.
py::list plan(const MatrixOp& op, Call call) {
  const std::string name = std::string("fastcurv::") + op.name + "_kernel<" + type_name(call.type) + ">";
  const int shared_bytes = op.prepare(call);
  py::list launches;
  for_each_batch(call.matrices, call.args.matrices, [&](int blocks) {
    launches.append(py::make_tuple(name, blocks, kMatrixThreads, kMatricesPerLaunch, shared_bytes,
                                   py::bytes(reinterpret_cast<const char*>(&call.args), sizeof call.args)));
  });
  return launches;
}

// Calls function(i) for i < count, each call on one of the threads that kernels run on: what it calls in turn gets no
// more threads. Raises what the first to fail raised.
void on_threads(const py::function& function, int count) {
  std::exception_ptr failure;
  {
    py::gil_scoped_release release;
#pragma omp parallel for schedule(dynamic, 1)
    for (int i = 0; i < count; ++i) {
      const py::gil_scoped_acquire acquire;
      try {
        if (!failure) function(i);
      } catch (...) {
        failure = std::current_exception();
      }
    }
  }
  if (failure) std::rethrow_exception(failure);
}

// The op by its name, and what it would launch. `read` makes a Call of the Python arguments.
template <typename... Arguments, typename... Names>
void bind_op(py::module_& module, const MatrixOp& op, Call (*read)(Arguments...), const Names&... names) {
  const auto def = [&](const std::string& name, const auto& function) {
    module.def(name.c_str(), function, py::arg("matrices"), py::arg("outs"), py::arg("info"), names...);
  };
  def(op.name, [&op, read](Arguments... arguments) { run(op, read(arguments...)); });
  if (!op.prepare) return;
  def(std::string(op.name) + "_kernel", [&op, read](Arguments... arguments) { return plan(op, read(arguments...)); });
}

}  // namespace

void bind(py::module_& module) {
  module.def("on_threads", &on_threads, py::arg("function"), py::arg("count"));
  const py::kw_only keywords;
  bind_op(module, kPolar, &read_call);
  bind_op(module, kGramSchmidt, &read_gram_schmidt, keywords, py::arg("floor"));
  bind_op(module, kNewtonSchulz, &read_newton_schulz, keywords, py::arg("coefficients"), py::arg("dtype"),
          py::arg("spectral"), py::arg("eps"));
}

}  // namespace fastcurv::matrix_ops
