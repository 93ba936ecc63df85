// Which instances of the kernels serve which call.
#include "fastcurv.h"
#include "lamb.cuh"
#include "launch.h"

namespace fastcurv {

CudaKernels lamb_cuda(Dtype param, Dtype state, int) { return kernels_of<LambRule, 0>(param, state); }

}  // namespace fastcurv
