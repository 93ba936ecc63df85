// What the bindings of ops share.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <vector>

#include "tensor_view.h"

namespace fastcurv {

// A tensor's view, and the dtype of the first of a list; raise TypeError, naming the argument, where there is none.
TensorView view(const pybind11::handle& object, const char* name);
Dtype dtype(const pybind11::list& tensors, const char* name);

// Copies items, as many at a time as an array of a kernel's argument holds, and calls launch(count).
template <typename Item, size_t kMost, typename Launch>
void for_each_batch(const std::vector<Item>& items, Item (&array)[kMost], const Launch& launch) {
  for (size_t begin = 0; begin < items.size(); begin += kMost) {
    const size_t count = std::min(kMost, items.size() - begin);
    std::copy_n(items.begin() + begin, count, array);
    launch(static_cast<int>(count));
  }
}

// The type that a dtype is stored in, as device code calls it.
const char* type_name(Dtype dtype);

// matrix_bindings.cpp, kron_bindings.cpp, kron_factor_bindings.cpp, kron_apply_bindings.cpp
namespace matrix_ops {
void bind(pybind11::module_& module);
}
namespace kron_ops {
void bind(pybind11::module_& module);
}
namespace kron_factor_op {
void bind(pybind11::module_& module);
}
namespace kron_apply_op {
void bind(pybind11::module_& module);
}

}  // namespace fastcurv
