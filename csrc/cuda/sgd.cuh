// SGD over a list of tensors: see ../sgd_rule.h for the formula.
//
// Floor: 20 bytes per float32 element (12 without momentum) over memory bandwidth.
#pragma once
#include "kernels.cuh"
#include "sgd_rule.h"
