// LARS over a list of tensors: see ../lars_rule.h for the formula.
//
// Floor: 20 bytes per float32 element over memory bandwidth, and 8 more in tensors of more than 32768, which are read
// twice.
#pragma once
#include "kernels.cuh"
#include "lars_rule.h"
