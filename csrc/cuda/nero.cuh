// Nero over a list of tensors: see ../nero_rule.h for the formula.
//
// Floor: 12 bytes per float32 element over memory bandwidth. Gradients come from shared memory the second time, weights
// from the caches.
#pragma once
#include "kernels.cuh"
#include "nero_rule.h"
