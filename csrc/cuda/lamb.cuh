// LAMB over a list of tensors: see ../lamb_rule.h for the formula.
//
// Floor: 28 bytes per float32 element over memory bandwidth, and 12 more in tensors of more than 32768. The first pass
// writes the moments by single elements, the second reads them from the caches.
#pragma once
#include "kernels.cuh"
#include "lamb_rule.h"
