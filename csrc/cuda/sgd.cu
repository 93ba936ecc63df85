// Which instances of the kernels serve which call.
#include "fastcurv.h"
#include "launch.h"
#include "sgd.cuh"

namespace fastcurv {

CudaKernels sgd_cuda(Dtype param, Dtype state, int variant) {
  return variant == SgdOp::kWithMomentum ? kernels_of<SgdRule, SgdOp::kWithMomentum>(param, state)
                                         : kernels_of<SgdRule, SgdOp::kPlain>(param, state);
}

}  // namespace fastcurv
