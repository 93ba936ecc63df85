// What the ops are called in Python, for bindings.cpp: the arguments of each, numbered as its rule numbers them.
#pragma once
#include <string>
#include <vector>

#include "fastcurv.h"

namespace fastcurv {

struct Op {
  const char* name;
  const char* rule;  // its class template
  std::vector<const char*> lists, scalars, options;
  // What the first option may be where it is a word; the variant of the rule is the number of the word.
  std::vector<const char*> words;
  int state_list;    // the dtype of its tensors is that of the state; -1: there is none
  int variant_list;  // a list whose absence makes the difference between variants 0 and 1; -1: none does
  CpuOp* cpu;
#ifdef FASTCURV_HAS_CUDA
  CudaOp* cuda;
#endif
};

const std::vector<Op>& ops();

}  // namespace fastcurv
