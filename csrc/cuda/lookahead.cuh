// The slow update of Lookahead over a list of tensors: see ../lookahead_rule.h for the formula.
//
// Floor: 16 bytes per float32 element over memory bandwidth.
#pragma once
#include "kernels.cuh"
#include "lookahead_rule.h"
