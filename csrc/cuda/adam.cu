// Which instances of the kernels serve which call.
#include "adam.cuh"
#include "fastcurv.h"
#include "launch.h"

namespace fastcurv {

CudaKernels adam_cuda(Dtype param, Dtype state, int variant) {
  switch (variant) {
    case AdamOp::kAmsgrad: return kernels_of<AdamRule, AdamOp::kAmsgrad>(param, state);
    case AdamOp::kRadam: return kernels_of<AdamRule, AdamOp::kRadam>(param, state);
    case AdamOp::kNadam: return kernels_of<AdamRule, AdamOp::kNadam>(param, state);
    case AdamOp::kYogi: return kernels_of<AdamRule, AdamOp::kYogi>(param, state);
    default: return kernels_of<AdamRule, AdamOp::kAdam>(param, state);
  }
}

}  // namespace fastcurv
