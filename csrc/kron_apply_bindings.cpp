// Bindings of kron_apply.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <vector>

#include "bindings.h"
#include "fastcurv.h"

namespace py = pybind11;

namespace fastcurv::kron_apply_op {
namespace {

struct Call {
  std::vector<Layer> layers;
  Dtype type;
  dlpack::Device device;
  // Of the device kernel: where results between products and partial sums lie, and its end.
  double *space, *space_end;
};

// Reads matrices, or vectors, of one dtype and device.
struct Reader {
  Dtype type;
  dlpack::Device device;

  void* operator()(const py::list& tensors, const char* name, size_t i, int64_t rows, int64_t columns) const {
    if (tensors.empty()) return nullptr;
    const TensorView v = view(tensors[i], name);
    const bool is_vector = rows == 1 && v.ndim == 1;
    if ((is_vector ? v.shape[0] != columns : v.ndim != 2 || v.shape[0] != rows || v.shape[1] != columns) ||
        v.dtype != static_cast<int>(type) || v.device.type != device.type || v.device.id != device.id) {
      throw py::value_error(std::string(name) + ": expected contiguous tensors of " + std::to_string(rows) + " x " +
                            std::to_string(columns) + " elements like the gradient, on the device of info");
    }
    return v.pointer;
  }
};

Call read_call(const py::list& grads, const py::list& lefts, const py::list& rights, const py::list& inputs,
               const py::list& left_values, const py::list& right_values, const py::list& updates,
               const py::object& products, const py::object& info, const py::object& workspace) {
  const TensorView sums = view(products, "products"), infos = view(info, "info"), words = view(workspace, "workspace");
  const size_t count = grads.size();
  const auto is_none_or_all = [&](const py::list& list) { return list.empty() || list.size() == count; };
  constexpr int kDouble = static_cast<int>(Dtype::float64);
  if (lefts.size() != count || rights.size() != count || updates.size() != count || !is_none_or_all(inputs) ||
      !is_none_or_all(left_values) || left_values.size() != right_values.size() ||
      infos.numel != static_cast<int64_t>(count) || infos.dtype != kUnknownDtype ||
      sums.numel != static_cast<int64_t>(2 * count) || sums.dtype != kDouble || words.dtype != kDouble ||
      sums.device.type != infos.device.type || words.device.type != infos.device.type) {
    throw py::value_error(
        "expected as many lefts, rights, updates, and elements of info (int32), as grads, twice as many of products "
        "(float64), as many inputs, left_values and right_values or none, and a workspace (float64)");
  }
  Call call;
  call.device = infos.device;
  call.type = count ? dtype(grads, "grads") : Dtype::float32;
  if (call.type != Dtype::float32 && call.type != Dtype::float64) {
    throw py::type_error("grads: expected float32 or float64");
  }
  call.space = static_cast<double*>(words.pointer);
  call.space_end = call.space + words.numel;
  const Reader read = {call.type, call.device};
  for (size_t i = 0; i < count; ++i) {
    const TensorView grad = view(grads[i], "grads"), left = view(lefts[i], "lefts"), right = view(rights[i], "rights");
    if (grad.ndim != 2 || left.ndim != 2 || right.ndim != 2) throw py::value_error("expected matrices");
    const int64_t d = left.shape[0], a = right.shape[0], m = inputs.empty() ? 0 : grad.shape[0];
    Layer layer;
    layer.grad = read(grads, "grads", i, m ? m : d, m ? d : a);
    layer.left = read(lefts, "lefts", i, d, d);
    layer.right = read(rights, "rights", i, a, a);
    layer.inputs = read(inputs, "inputs", i, m, a);
    layer.left_values = read(left_values, "left_values", i, 1, d);
    layer.right_values = read(right_values, "right_values", i, 1, a);
    layer.update = read(updates, "updates", i, d, a);
    layer.products = static_cast<double*>(sums.pointer) + 2 * i;
    layer.info = static_cast<int*>(infos.pointer) + i;
    layer.rows = d, layer.columns = a, layer.samples = m;
    call.layers.push_back(layer);
  }
  return call;
}

// The launches of the device kernel: products that others wait for first, then those, then the sums.
constexpr int kStages = 4;
struct Plan {
  std::vector<Product> stages[kStages];
  std::vector<Summed> summed;
};

// Gives out the space for what lies between products.
class Space {
 public:
  explicit Space(const Call& call) : next_(call.space), end_(call.space_end), is_double_(call.type == Dtype::float64) {}

  double* doubles(int64_t count) {
    double* const from = next_;
    next_ += count;
    if (next_ > end_) throw py::value_error("workspace: too small");
    return from;
  }
  void* matrix(int64_t rows, int64_t columns) {
    return doubles(is_double_ ? rows * columns : (rows * columns + 1) / 2);
  }

 private:
  double *next_, *end_;
  bool is_double_;
};

// A row-major matrix as an operand of a product, or its transpose.
struct Operand {
  const void* from;
  int down, across;
};
Operand plain(const void* from, int64_t columns) { return {from, static_cast<int>(columns), 1}; }
Operand transposed(const void* from, int64_t columns) { return {from, 1, static_cast<int>(columns)}; }

Product product(const Operand& x, const Operand& y, void* out, int64_t rows, int64_t columns, int64_t depth) {
  Product p = {};
  p.x = x.from, p.y = y.from, p.out = out, p.scale = 1.0;
  p.rows = static_cast<int>(rows), p.columns = static_cast<int>(columns), p.depth = static_cast<int>(depth);
  p.x_row = x.down, p.x_depth = x.across, p.y_depth = y.down, p.y_column = y.across;
  return p;
}

int64_t tiles(const Product& p) { return tiles_along(p.rows) * tiles_along(p.columns); }

void add_layer(const Layer& l, Space& space, Plan& plan) {
  const int64_t d = l.rows, a = l.columns, m = l.samples;
  Summed sums = {nullptr, l.update, l.products, l.info, d * a, tiles_along(d) * tiles_along(a)};
  const int64_t of_update = sums.count;
  if (m) sums.count += tiles_along(m) * tiles_along(m);
  double* const partials = space.doubles(2 * sums.count);
  sums.partials = partials;
  plan.summed.push_back(sums);
  if (m) {
    void *const left = space.matrix(m, d), *const right = space.matrix(m, a), *const gram = space.matrix(m, m);
    const double scale = 1.0 / static_cast<double>(m);
    plan.stages[0].push_back(product(plain(l.grad, d), transposed(l.left, d), left, m, d, d));
    plan.stages[0].push_back(product(plain(l.inputs, a), plain(l.right, a), right, m, a, a));
    Product update = product(transposed(left, d), plain(right, a), l.update, d, a, m);
    update.scale = scale, update.partials = partials;
    plan.stages[1].push_back(update);
    Product grams = product(plain(l.grad, d), transposed(left, d), gram, m, m, d);
    grams.scale = scale;
    plan.stages[1].push_back(grams);
    grams = product(plain(l.inputs, a), transposed(right, a), nullptr, m, m, a);
    grams.scale = scale, grams.with = gram, grams.partials = partials + 2 * of_update;
    plan.stages[2].push_back(grams);
    return;
  }
  void* const first = space.matrix(d, a);
  Product update;
  if (l.left_values) {
    void* const second = space.matrix(d, a);
    plan.stages[0].push_back(product(transposed(l.left, d), plain(l.grad, a), first, d, a, d));
    Product divided = product(plain(first, a), plain(l.right, a), second, d, a, a);
    divided.row_values = l.left_values, divided.column_values = l.right_values;
    plan.stages[1].push_back(divided);
    plan.stages[2].push_back(product(plain(l.left, d), plain(second, a), first, d, a, d));
    update = product(plain(first, a), transposed(l.right, a), l.update, d, a, a);
  } else {
    plan.stages[0].push_back(product(plain(l.left, d), plain(l.grad, a), first, d, a, d));
    update = product(plain(first, a), plain(l.right, a), l.update, d, a, a);
  }
  update.with = l.grad, update.partials = partials;
  plan.stages[l.left_values ? 3 : 1].push_back(update);
}

// Calls launch(args, blocks) for each launch, blocks being those that have something to do.
template <typename Launch>
void for_each_launch(const Call& call, const Launch& launch) {
  for (const Layer& l : call.layers) {
    constexpr int64_t kMost = 1 << 20;  // so that tiles and strides are ints
    if (std::max({l.rows, l.columns, l.samples}) > kMost) throw py::value_error("expected at most 2^20 rows");
  }
  Plan plan;
  Space space(call);
  for (const Layer& layer : call.layers) {
    if (layer.rows && layer.columns) {
      add_layer(layer, space, plan);
    } else {
      plan.summed.push_back({nullptr, layer.update, layer.products, layer.info, 0, 0});
    }
  }
  KronApplyArgs args = {};
  for (std::vector<Product>& stage : plan.stages) {
    for_each_batch(stage, args.products, [&](int count) {
      args.count = count;
      args.tiles = 0;
      for (int i = 0; i < count; ++i) {
        args.products[i].first_tile = static_cast<int>(args.tiles);
        args.tiles += tiles(args.products[i]);
      }
      launch(args, static_cast<int>(args.tiles));
    });
  }
  args.tiles = 0;
  for_each_batch(plan.summed, args.summed, [&](int count) {
    args.count = count;
    launch(args, count);
  });
}

void run(const Call& call) {
  if (call.device.type == dlpack::kCPU) {
    py::gil_scoped_release release;
    return kron_apply_cpu(call.layers, call.type);
  }
#ifdef FASTCURV_HAS_CUDA
  void* stream = current_stream(call.device.id);
  int error = 0;
  for_each_launch(call, [&](const KronApplyArgs& args, int blocks) {
    if (!error) error = cuda_launch(kron_apply_cuda(call.type), blocks, args, call.device.id, stream);
  });
  if (error) throw std::runtime_error(std::string("kron_apply: CUDA launch failed: ") + cuda_error_text(error));
#else
  throw std::runtime_error("kron_apply: this build of fastcurv._C has no CUDA code; see README, Build for your GPU");
#endif
}

// The same call as kernels that somebody else launches: see plan() in bindings.cpp.
py::list plan(const Call& call) {
  const std::string name = std::string("fastcurv::kron_apply_kernel<") + type_name(call.type) + ">";
  py::list launches;
  for_each_launch(call, [&](const KronApplyArgs& args, int blocks) {
    launches.append(py::make_tuple(name, blocks, kMatrixThreads, kBlocksPerMultiprocessor, 0,
                                   py::bytes(reinterpret_cast<const char*>(&args), sizeof args)));
  });
  return launches;
}

}  // namespace

void bind(py::module_& module) {
  const auto def = [&](const char* name, const auto& function) {
    module.def(
        name,
        [function](const py::list& grads, const py::list& lefts, const py::list& rights, const py::list& inputs,
                   const py::list& left_values, const py::list& right_values, const py::list& updates,
                   const py::object& products, const py::object& info, const py::object& workspace) {
          return function(
              read_call(grads, lefts, rights, inputs, left_values, right_values, updates, products, info, workspace));
        },
        py::arg("grads"), py::arg("lefts"), py::arg("rights"), py::arg("inputs"), py::arg("left_values"),
        py::arg("right_values"), py::arg("updates"), py::arg("products"), py::arg("info"), py::arg("workspace"));
  };
  def("kron_apply", &run);
  def("kron_apply_kernel", &plan);
}

}  // namespace fastcurv::kron_apply_op
