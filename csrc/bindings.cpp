// The one pybind11 module, fastcurv._C. Python has checked every argument (fastcurv/_check.py); what is checked here
// again is only what would otherwise read or write outside a tensor.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <optional>
#include <string>

#include "chunks.h"
#include "cuda_sources.h"
#include "fastcurv.h"
#include "tensor_view.h"

namespace py = pybind11;
using namespace fastcurv;

namespace {

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

// The table tensor, and the number of chunks its length implies (it may be in device memory).
struct TableView {
  TensorView tensor;
  int64_t chunks = 0;
  long long* words() const { return static_cast<long long*>(tensor.pointer); }
};

TableView table_view(const py::object& table, size_t tensors, int lists) {
  TableView out;
  out.tensor = view(table, "table");
  out.chunks = out.tensor.numel - kTableHeader - static_cast<int64_t>(tensors) * (1 + lists);
  if (out.chunks < 0) throw py::value_error("table: built for fewer tensors than the lists hold");
  return out;
}

struct AdamCall {
  TableView table;
  AdamArgs args;
  Dtype param, state;
  SecondMoment rule;
};

// The signature of adam_, once, for every function that takes it.
template <typename Function>
auto with_adam_call(Function function) {
  return [function](const py::list& params, const py::list&, const py::list& exp_avgs, const py::list&, const py::list&,
                    const py::list&, const py::object& table, const py::object& lr, const py::object& beta1,
                    const py::object& beta2, const py::object& eps, const py::object& weight_decay,
                    bool decoupled_weight_decay, bool amsgrad, bool maximize, const py::object& grad_scale,
                    const py::object& found_inf) {
    AdamCall call;
    call.table = table_view(table, params.size(), kAdamLists);
    call.args = {call.table.words(),
                 scalar(lr, "lr"),
                 scalar(beta1, "beta1"),
                 scalar(beta2, "beta2"),
                 scalar(eps, "eps"),
                 scalar(weight_decay, "weight_decay"),
                 flag(grad_scale, "grad_scale"),
                 flag(found_inf, "found_inf"),
                 decoupled_weight_decay,
                 maximize};
    call.param = dtype(params, "params");
    call.state = dtype(exp_avgs, "exp_avgs");
    call.rule = amsgrad ? SecondMoment::amsgrad : SecondMoment::adam;
    return function(call);
  };
}

void adam(const AdamCall& call) {
  const auto device = call.table.tensor.device;
  if (device.type == dlpack::kCPU) {
    py::gil_scoped_release release;
    return adam_cpu(call.args, call.param, call.state, call.rule);
  }
#ifdef FASTCURV_HAS_CUDA
  void* stream = current_stream(device.id);
  int error = 0;
  {
    py::gil_scoped_release release;
    int multiprocessors = 0;
    error = cuda_multiprocessors(device.id, &multiprocessors);
    const int64_t most = static_cast<int64_t>(multiprocessors) * kAdamLaunch.blocks_per_multiprocessor;
    const int blocks = static_cast<int>(std::max<int64_t>(1, std::min(call.table.chunks, most)));
    if (!error) error = adam_cuda(call.args, call.param, call.state, call.rule, device.id, blocks, stream);
  }
  if (error) throw std::runtime_error(std::string("adam: CUDA launch failed: ") + cuda_error_text(error));
#else
  throw std::runtime_error("adam: this build of fastcurv._C has no CUDA code; see README, Build for your GPU");
#endif
}

// The same call as a kernel that somebody else launches (NVRTC): name expression, chunks, threads, blocks per
// multiprocessor, and the bytes of its one argument.
py::tuple adam_kernel(const AdamCall& call) {
  static const char* const types[] = {"float", "double", "fastcurv::bfloat16", "fastcurv::float16"};
  static const char* const rules[] = {"adam", "amsgrad"};
  const std::string name = std::string("fastcurv::adam_kernel<") + types[static_cast<int>(call.param)] + ", " +
                           types[static_cast<int>(call.state)] +
                           ", fastcurv::SecondMoment::" + rules[static_cast<int>(call.rule)] + ">";
  return py::make_tuple(name, call.table.chunks, kAdamLaunch.threads, kAdamLaunch.blocks_per_multiprocessor,
                        py::bytes(reinterpret_cast<const char*>(&call.args), sizeof call.args));
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
      .def("words", &ChunkTable::words, py::arg("chunk_elements"))
      .def(
          "write",
          [](const ChunkTable& t, uintptr_t address, int64_t chunk_elements) {
            t.write(reinterpret_cast<int64_t*>(address), chunk_elements);
          },
          py::arg("address"), py::arg("chunk_elements"));

  const auto define = [&](const char* name, auto function) {
    m.def(name, function, py::arg("params"), py::arg("grads"), py::arg("exp_avgs"), py::arg("exp_avg_sqs"),
          py::arg("max_exp_avg_sqs"), py::arg("steps"), py::arg("table"), py::kw_only(), py::arg("lr"),
          py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"),
          py::arg("decoupled_weight_decay"), py::arg("amsgrad"), py::arg("maximize"), py::arg("grad_scale"),
          py::arg("found_inf"));
  };
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
        return stream_cpu(static_cast<const long long*>(words.pointer), lists, block_elements);
      },
      py::arg("table"), py::arg("item_sizes"), py::arg("is_written"), py::arg("block_elements"));

  define("adam_", with_adam_call(adam));
  define("adam_kernel", with_adam_call(adam_kernel));
}
