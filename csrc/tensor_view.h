// Tensors and the current stream of PyTorch, seen without a torch header.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "dlpack.h"
#include "numeric.h"

namespace fastcurv {

constexpr int kUnknownDtype = -1;

// A borrowed view: valid while the GIL is held and the tensor is not touched.
struct TensorView {
  void* pointer = nullptr;
  int64_t numel = 0;
  int ndim = 0;
  int dtype = kUnknownDtype;  // a Dtype, or kUnknownDtype
  dlpack::Device device = {0, 0};
  const int64_t* shape = nullptr;
  const int64_t* strides = nullptr;
  std::vector<int64_t> storage;  // of shape and strides, on the slow path only
};

bool is_tensor(PyObject* object);

// False, with no Python error left, when the object is no tensor with a pointer and strides (sparse, say).
bool view_tensor(PyObject* object, TensorView& view);

void* current_stream(int device);

// Whether views come through the exchange API; set_exchange_api(false) forces the slower attribute path (tests).
bool exchange_api();
void set_exchange_api(bool enabled);

}  // namespace fastcurv
