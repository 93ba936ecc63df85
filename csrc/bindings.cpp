// The one pybind11 module, fastcurv._C. Python has checked every argument (fastcurv/_check.py); what is checked here
// again is only what would otherwise read or write outside a tensor.
#include "bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <optional>
#include <string>

#include "chunks.h"
#include "cuda_sources.h"
#include "ops.h"
#include "rule.h"
#include "tensor_view.h"

namespace py = pybind11;
using namespace fastcurv;

namespace fastcurv {

TensorView view(const py::handle& object, const char* name) {
  TensorView out;
  if (!view_tensor(object.ptr(), out)) throw py::type_error(std::string(name) + ": expected a dense tensor");
  return out;
}

Dtype dtype(const py::list& tensors, const char* name) {
  const TensorView first = view(tensors[0], name);
  if (first.dtype == kUnknownDtype) throw py::type_error(std::string(name) + ": unsupported dtype");
  return static_cast<Dtype>(first.dtype);
}

const char* type_name(Dtype dtype) {
  static const char* const names[] = {"float", "double", "fastcurv::bfloat16", "fastcurv::float16"};
  return names[static_cast<int>(dtype)];
}

}  // namespace fastcurv

namespace {

// A float, or a one-element tensor: read here when it is in host memory, by the kernel when it is on the GPU.
Scalar scalar(const py::object& value, const char* name) {
  if (!is_tensor(value.ptr())) return {value.cast<double>(), nullptr, nullptr};
  const TensorView v = view(value, name);
  const bool is_double = v.dtype == static_cast<int>(Dtype::float64);
  if (v.numel != 1 || !(is_double || v.dtype == static_cast<int>(Dtype::float32))) {
    throw py::value_error(std::string(name) + ": expected a number or a one-element float32 or float64 tensor");
  }
  const Scalar pointer = {0.0, is_double ? nullptr : static_cast<const float*>(v.pointer),
                          is_double ? static_cast<const double*>(v.pointer) : nullptr};
  return v.device.type == dlpack::kCPU ? Scalar{pointer.get(), nullptr, nullptr} : pointer;
}

const float* flag(const py::object& value, const char* name) {
  if (value.is_none()) return nullptr;
  const TensorView v = view(value, name);
  if (v.numel != 1 || v.dtype != static_cast<int>(Dtype::float32)) {
    throw py::value_error(std::string(name) + ": expected a one-element float32 tensor");
  }
  return static_cast<const float*>(v.pointer);
}

// A call of one of the ops, read from its Python arguments.
struct Call {
  const Op* op;
  Args args;
  Dtype param, state;
  int variant;
  dlpack::Device device;
  int64_t chunks, partials;
};

// The dtype of state where a call has none.
Dtype default_state(Dtype param) { return param == Dtype::float64 ? Dtype::float64 : Dtype::float32; }

Call read_call(const Op& op, const py::args& args, const py::kwargs& keywords) {
  const size_t lists = op.lists.size();
  if (args.size() != lists + 1 || !py::isinstance<py::tuple>(args[lists])) {
    throw py::type_error(std::string(op.name) + ": expected " + std::to_string(lists) + " lists and a table");
  }
  const auto argument = [&](const char* name) -> py::object {
    if (!keywords.contains(name)) throw py::type_error(std::string(op.name) + ": missing argument " + name);
    return keywords[name];
  };
  const auto list = [&](int number) { return py::list(args[number]); };

  Call call = {};
  call.op = &op;
  const py::tuple table = args[lists];
  const TensorView words = view(table[0], "table");
  call.device = words.device;
  call.chunks = table[1].cast<int64_t>();
  call.partials = table[2].cast<int64_t>();
  const int64_t records = static_cast<int64_t>(list(0).size() * (kRecord + lists));
  if (words.numel < kTableHeader + records + call.chunks + call.partials) {
    throw py::value_error("table: built for fewer tensors than the lists hold");
  }
  call.args.words = static_cast<long long*>(words.pointer);
  for (size_t i = 0; i < op.scalars.size(); ++i) {
    call.args.scalars[i] = scalar(argument(op.scalars[i]), op.scalars[i]);
  }
  for (size_t i = 0; i < op.options.size(); ++i) {
    const py::object value = argument(op.options[i]);
    if (i == 0 && !op.words.empty()) {
      const auto word = std::find(op.words.begin(), op.words.end(), value.cast<std::string>());
      if (word == op.words.end()) throw py::value_error(std::string(op.options[i]) + ": unknown");
      call.args.options[i] = call.variant = static_cast<int>(word - op.words.begin());
    } else {
      call.args.options[i] = value.cast<long long>();
    }
  }
  size_t expected = op.scalars.size() + op.options.size() + 1;
  call.args.found_inf = flag(argument("found_inf"), "found_inf");
  if (keywords.contains("grad_scale")) {
    call.args.grad_scale = flag(argument("grad_scale"), "grad_scale");
    ++expected;
  }
  if (keywords.size() != expected) throw py::type_error(std::string(op.name) + ": unexpected keyword arguments");
  call.param = dtype(list(0), op.lists[0]);
  const bool has_state = op.state_list >= 0 && !list(op.state_list).empty();
  call.state = has_state ? dtype(list(op.state_list), op.lists[op.state_list]) : default_state(call.param);
  if (op.variant_list >= 0) call.variant = !list(op.variant_list).empty();
  return call;
}

#ifdef FASTCURV_HAS_CUDA
int launch(const Call& call, void* stream) {
  int multiprocessors = 0;
  int error = cuda_multiprocessors(call.device.id, &multiprocessors);
  const Launch how = launch_of(call.param == Dtype::float64);
  const CudaKernels kernels = call.op->cuda(call.param, call.state, call.variant);
  const auto run = [&](CudaKernel kernel, int64_t busy) {
    const int64_t most = static_cast<int64_t>(multiprocessors) * how.blocks_per_multiprocessor;
    const int blocks = static_cast<int>(std::max<int64_t>(1, std::min(busy, most)));
    if (!error) error = cuda_launch(kernel, blocks, how.threads, call.args, call.device.id, stream);
  };
  if (call.partials) {
    run(kernels.partials, call.partials);
    run(kernels.rows, call.partials);
  }
  run(kernels.update, call.chunks);
  return error;
}
#endif

// Says of lists that are written on some steps only whether they were, where that is known.
std::optional<bool> run(const Op& op, const py::args& args, const py::kwargs& keywords) {
  const Call call = read_call(op, args, keywords);
  if (call.device.type == dlpack::kCPU) {
    py::gil_scoped_release release;
    return op.cpu(call.args, call.param, call.state, call.variant);
  }
#ifdef FASTCURV_HAS_CUDA
  void* stream = current_stream(call.device.id);
  int error = 0;
  {
    py::gil_scoped_release release;
    error = launch(call, stream);
  }
  if (error) throw std::runtime_error(std::string(op.name) + ": CUDA launch failed: " + cuda_error_text(error));
  return std::nullopt;
#else
  throw std::runtime_error(std::string(op.name) +
                           ": this build of fastcurv._C has no CUDA code; see README, Build for your GPU");
#endif
}

// The same call as kernels that somebody else launches (NVRTC, the host emulator): for each, in order, its name
// expression, the number of blocks that have something to do, threads, blocks per multiprocessor, bytes of dynamic
// shared memory, and the bytes of its one argument.
py::list plan(const Op& op, const py::args& args, const py::kwargs& keywords) {
  const Call call = read_call(op, args, keywords);
  const std::string rule = std::string("fastcurv::") + op.rule + "<" + type_name(call.param) + ", " +
                           type_name(call.state) + ", " + std::to_string(call.variant) + ">";
  const Launch how = launch_of(call.param == Dtype::float64);
  py::list launches;
  const auto add = [&](const char* kernel, int64_t busy) {
    launches.append(py::make_tuple(std::string("fastcurv::") + kernel + "<" + rule + ">", busy, how.threads,
                                   how.blocks_per_multiprocessor, 0,
                                   py::bytes(reinterpret_cast<const char*>(&call.args), sizeof call.args)));
  };
  if (call.partials) {
    add("partials_kernel", call.partials);
    add("rows_kernel", call.partials);
  }
  add("update_kernel", call.chunks);
  return launches;
}

// The signature of an op as the first line of a docstring.
std::string signature(const Op& op) {
  std::string text = std::string(op.name) + "_(";
  for (const char* name : op.lists) text += std::string(name) + ": list, ";
  text += "table: tuple, *";
  for (const char* name : op.scalars) text += std::string(", ") + name + ": float";
  for (const char* name : op.options) text += std::string(", ") + name + ": int";
  if (std::string(op.lists[1]) == "grads") text += ", grad_scale: object";
  return text + ", found_inf: object) -> object";
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of fastcurv. Private: call fastcurv.ops.";

  m.def("simd_level", &simd_level);
  m.def("exchange_api", &exchange_api);
  m.def("set_exchange_api", &set_exchange_api, py::arg("enabled"));
  m.def("cuda_sources", [] {
    std::map<std::string, std::string> sources;
    for (const CudaSource* s = kCudaSources; s->name; ++s) sources[s->name] = s->text;
    return sources;
  });
  m.def("cuda_architectures", [] { return std::string(FASTCURV_CUDA_ARCHITECTURES); });
  m.def(
      "cuda_unusable",
      [](int device) -> std::optional<std::string> {
#ifdef FASTCURV_HAS_CUDA
        const int error = cuda_has_code_for(device);
        return error ? std::optional<std::string>(cuda_error_text(error)) : std::nullopt;
#else
        (void)device;
        return "fastcurv._C was built without CUDA";
#endif
      },
      py::arg("device"));

  py::class_<ChunkTable>(m, "ChunkTable")
      .def(py::init<std::vector<bool>>(), py::arg("is_mutated"))
      .def(
          "update",
          [](ChunkTable& t, const py::sequence& lists, const py::sequence& names, bool accept) {
            return static_cast<int>(t.update(lists, names, accept));
          },
          py::arg("lists"), py::arg("names"), py::arg("accept"))
      .def("gather", &ChunkTable::gather, py::arg("params"), py::arg("states"), py::arg("keys"))
      .def(
          "size",
          [](const ChunkTable& t, int64_t chunk_elements, int rows) {
            const ChunkTable::Size size = t.size(chunk_elements, rows);
            return py::make_tuple(size.words, size.written, size.chunks, size.partials);
          },
          py::arg("chunk_elements"), py::arg("rows"))
      .def(
          "write",
          [](const ChunkTable& t, uintptr_t address, int64_t chunk_elements, int rows) {
            t.write(reinterpret_cast<int64_t*>(address), chunk_elements, rows);
          },
          py::arg("address"), py::arg("chunk_elements"), py::arg("rows"));

  m.def(
      "stream_",
      [](const py::object& table, const std::vector<int>& item_sizes, const std::vector<bool>& is_written,
         int64_t block_elements) {
        const TensorView words = view(table, "table");
        if (words.device.type != dlpack::kCPU) throw py::value_error("table: expected a tensor in host memory");
        if (is_written.size() != item_sizes.size()) throw py::value_error("is_written: expected one for each list");
        if (block_elements < 1) throw py::value_error("block_elements: expected a positive number");
        std::vector<StreamList> lists;
        for (size_t l = 0; l < item_sizes.size(); ++l) lists.push_back({item_sizes[l], is_written[l]});
        py::gil_scoped_release release;
        return stream_cpu(static_cast<long long*>(words.pointer), lists, block_elements);
      },
      py::arg("table"), py::arg("item_sizes"), py::arg("is_written"), py::arg("block_elements"));

  matrix_ops::bind(m);
  kron_ops::bind(m);
  kron_factor_op::bind(m);
  kron_apply_op::bind(m);

  py::options options;
  options.disable_function_signatures();
  for (const Op& op : ops()) {
    m.def((std::string(op.name) + "_").c_str(),
          [&op](const py::args& args, const py::kwargs& keywords) { return run(op, args, keywords); },
          signature(op).c_str());
    m.def((std::string(op.name) + "_kernel").c_str(),
          [&op](const py::args& args, const py::kwargs& keywords) { return plan(op, args, keywords); });
  }
}
