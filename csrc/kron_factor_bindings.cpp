// Bindings of the op kron_factor_.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings.h"
#include "fastcurv.h"

namespace py = pybind11;

namespace fastcurv::kron_factor_op {
namespace {

using Numbers = std::vector<int>;

// A call of the op, read from its Python arguments.
struct Call {
  std::vector<Statistic> statistics;
  Dtype samples = Dtype::float32, sums = Dtype::float32;
  dlpack::Device device;
  StatisticArgs args = {};  // of the device kernels
};

// Eight numbers as what a convolution sees of images.
Patches read_patches(const Numbers& numbers, const TensorView& images) {
  if (numbers.size() != 8 || images.ndim != 4) {
    throw py::value_error("patches: expected eight numbers, for four-dimensional inputs");
  }
  const auto size = [&](int dim) { return static_cast<int>(images.shape[dim]); };
  Patches p = {size(1), size(2), size(3), {}, {}, {}, {}, {}};
  for (int d = 0; d < 2; ++d) {
    p.kernel[d] = numbers[d];
    p.stride[d] = numbers[2 + d];
    p.padding[d] = numbers[4 + d];
    p.dilation[d] = numbers[6 + d];
    const int places = size(2 + d) + 2 * p.padding[d] - p.dilation[d] * (p.kernel[d] - 1) - 1;
    if (p.kernel[d] < 1 || p.stride[d] < 1 || p.padding[d] < 0 || p.dilation[d] < 1 || places < 0) {
      throw py::value_error("patches: expected a kernel that fits into the padded images");
    }
    p.outputs[d] = places / p.stride[d] + 1;
  }
  return p;
}

// Fills in what samples are; returns how many there are.
long long read_samples(const py::handle& tensor, const Numbers& patches, const Call& call, Samples& samples) {
  const TensorView from = view(tensor, "inputs");
  const bool is_matrix = patches.empty() && from.ndim == 2;
  if ((patches.empty() && !is_matrix) || from.dtype != static_cast<int>(call.samples) ||
      from.device.type != call.device.type || from.device.id != call.device.id) {
    throw py::value_error("inputs: expected contiguous matrices, or images with patches, of one dtype and device");
  }
  samples.values = from.pointer;
  if (is_matrix) {
    samples.columns = from.shape[1];
    return from.shape[0];
  }
  samples.patches = read_patches(patches, from);
  const Patches& p = samples.patches;
  samples.columns = static_cast<long long>(p.channels) * p.kernel[0] * p.kernel[1];
  return from.shape[0] * p.outputs[0] * p.outputs[1];
}

Call read_call(const py::list& factors, const py::list& inputs, const py::list& others, const py::object& traces,
               const py::object& info, const py::object& workspace, double decay, const std::vector<double>& scale,
               bool has_ones, const std::vector<Numbers>& patches, const py::object& dtype_of_sums) {
  const TensorView sums = view(traces, "traces"), infos = view(info, "info"), work = view(workspace, "workspace");
  const size_t count = factors.size();
  if (inputs.size() != count || (others.size() && others.size() != count) || scale.size() != count ||
      patches.size() != count || sums.numel != static_cast<int64_t>(count) || infos.numel != sums.numel ||
      sums.dtype != static_cast<int>(Dtype::float64) || infos.dtype != kUnknownDtype) {
    throw py::value_error(
        "expected as many inputs, others or none, scale, patches, traces (float64) and info (int32) as factors");
  }
  Call call;
  call.device = infos.device;
  if (count == 0) return call;
  call.samples = dtype(inputs, "inputs");
  const Dtype stored = call.samples == Dtype::float64 ? Dtype::float64 : Dtype::float32;
  const bool in_double = py::str(dtype_of_sums).cast<std::string>() == "torch.float64";
  call.sums = in_double ? Dtype::float64 : stored;
  for (size_t i = 0; i < count; ++i) {
    Statistic s = {};
    const TensorView factor = view(factors[i], "factors");
    s.has_ones = has_ones;
    s.decay = decay;
    s.scale = scale[i];
    s.count = read_samples(inputs[i], patches[i], call, s.x);
    if (others.size() && read_samples(others[i], patches[i], call, s.y) != s.count) {
      throw py::value_error("others: expected as many samples as inputs have");
    }
    if (factor.ndim != 2 || factor.shape[0] != s.rows() || factor.shape[1] != s.columns() ||
        factor.dtype != static_cast<int>(stored) || factor.device.type != call.device.type ||
        factor.device.id != call.device.id) {
      throw py::value_error("factors: expected contiguous matrices of as many rows and columns as samples have");
    }
    s.factor = factor.pointer;
    s.work = work.pointer;
    s.trace = static_cast<double*>(sums.pointer) + i;
    s.info = static_cast<int*>(infos.pointer) + i;
    call.statistics.push_back(s);
  }
  return call;
}

// Calls launch() for as many matrices at a time as travel with one, each with its own part of the workspace. Launches
// follow each other: they share it. Returns how many elements they need.
template <typename Launch>
long long for_each_launch(Call& call, const Launch& launch) {
  const long long item_size = call.sums == Dtype::float64 ? 8 : 4;
  long long most = 0;
  for_each_batch(call.statistics, call.args.statistics, [&](int count) {
    call.args.count = count;
    long long elements = 0, tiles = 0, blocks = 0;
    for (int i = 0; i < count; ++i) {
      Statistic& s = call.args.statistics[i];
      s.work = static_cast<char*>(s.work) + elements * item_size;
      elements += s.work_elements();
      tiles += s.tiles();
      blocks += s.tiles() * s.splits();
    }
    most = std::max(most, elements);
    if (blocks >= 1ll << 31) throw py::value_error("factors: expected matrices of less than 2^31 tiles of 64 x 64");
    launch(static_cast<int>(blocks), static_cast<int>(tiles));
  });
  return most;
}

void check_workspace(Call& call, const py::object& workspace) {
  const TensorView work = view(workspace, "workspace");
  const long long needed = for_each_launch(call, [](int, int) {});
  if (work.numel < needed || (needed && (work.dtype != static_cast<int>(call.sums) ||
                                         work.device.type != call.device.type || work.device.id != call.device.id))) {
    throw py::value_error("workspace: expected " + std::to_string(needed) + " elements of the dtype of sums, got " +
                          std::to_string(work.numel));
  }
}

void run(Call call, const py::object& workspace) {
  if (call.device.type == dlpack::kCPU) {
    py::gil_scoped_release release;
    return kron_factor_cpu(call.statistics, call.samples, call.sums);
  }
#ifdef FASTCURV_HAS_CUDA
  check_workspace(call, workspace);
  void* stream = current_stream(call.device.id);
  int error = 0;
  {
    py::gil_scoped_release release;
    const CudaStatisticKernels kernels = kron_factor_cuda(call.samples, call.sums);
    for_each_launch(call, [&](int blocks, int tiles) {
      if (!error) error = cuda_launch(kernels.sums, blocks, call.args, call.device.id, stream);
      if (!error) error = cuda_launch(kernels.update, tiles, call.args, call.device.id, stream);
    });
  }
  if (error) throw std::runtime_error(std::string("kron_factor_: CUDA launch failed: ") + cuda_error_text(error));
#else
  (void)workspace;
  throw std::runtime_error("kron_factor_: this build of fastcurv._C has no CUDA code; see README, Build for your GPU");
#endif
}

// The same call as kernels that somebody else launches: see plan() in bindings.cpp.
py::list plan(Call call, const py::object& workspace) {
  check_workspace(call, workspace);
  const std::string name =
      std::string("fastcurv::kron_factor_kernel<") + type_name(call.samples) + ", " + type_name(call.sums);
  py::list launches;
  for_each_launch(call, [&](int blocks, int tiles) {
    const py::bytes args(reinterpret_cast<const char*>(&call.args), sizeof call.args);
    // One multiprocessor may get all blocks: each does its own part.
    launches.append(py::make_tuple(name + ", false>", blocks, kMatrixThreads, blocks, 0, args));
    launches.append(py::make_tuple(name + ", true>", tiles, kMatrixThreads, tiles, 0, args));
  });
  return launches;
}

}  // namespace

void bind(py::module_& module) {
  const auto def = [&](const char* name, const auto& function) {
    module.def(
        name,
        [function](const py::list& factors, const py::list& inputs, const py::list& others, const py::object& traces,
                   const py::object& info, const py::object& workspace, double decay, const std::vector<double>& scale,
                   bool has_ones, const std::vector<Numbers>& patches, const py::object& dtype) {
          return function(
              read_call(factors, inputs, others, traces, info, workspace, decay, scale, has_ones, patches, dtype),
              workspace);
        },
        py::arg("factors"), py::arg("inputs"), py::arg("others"), py::arg("traces"), py::arg("info"),
        py::arg("workspace"), py::kw_only(), py::arg("decay"), py::arg("scale"), py::arg("has_ones"),
        py::arg("patches"), py::arg("dtype"));
  };
  def("kron_factor_", &run);
  def("kron_factor_kernel", &plan);
  // How many elements the workspace of the device kernels must have.
  def("kron_factor_workspace", [](Call call, const py::object&) { return for_each_launch(call, [](int, int) {}); });
}

}  // namespace fastcurv::kron_factor_op
