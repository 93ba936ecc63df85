// Ranger over a list of tensors: see ../ranger_rule.h for the formula.
//
// Floor: 28 bytes per float32 element over memory bandwidth, and 8 more on every k-th step. The mean needs the gradient
// twice: the second time it comes from shared memory.
#pragma once
#include "kernels.cuh"
#include "ranger_rule.h"
