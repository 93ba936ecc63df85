// Which instances of the kernels serve which call.
#include "fastcurv.h"
#include "lars.cuh"
#include "launch.h"

namespace fastcurv {

CudaKernels lars_cuda(Dtype param, Dtype state, int) { return kernels_of<LarsRule, 0>(param, state); }

}  // namespace fastcurv
