// What the bindings of ops share.
#pragma once
#include <pybind11/pybind11.h>

#include "tensor_view.h"

namespace fastcurv {

// A tensor's view, and the dtype of the first of a list; raise TypeError, naming the argument, where there is none.
TensorView view(const pybind11::handle& object, const char* name);
Dtype dtype(const pybind11::list& tensors, const char* name);

// The type that a dtype is stored in, as device code calls it.
const char* type_name(Dtype dtype);

// matrix_bindings.cpp
void bind_matrix_ops(pybind11::module_& module);

}  // namespace fastcurv
