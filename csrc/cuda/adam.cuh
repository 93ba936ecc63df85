// The Adam family over a list of tensors: see ../adam_rule.h for the formula.
//
// Floor: 28 bytes per float32 element (36 with AMSGrad) over memory bandwidth.
#pragma once
#include "adam_rule.h"
#include "kernels.cuh"
