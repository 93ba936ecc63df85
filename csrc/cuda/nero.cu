// Which instances of the kernels serve which call.
#include "fastcurv.h"
#include "launch.h"
#include "nero.cuh"

namespace fastcurv {

CudaKernels nero_cuda(Dtype param, Dtype state, int) { return kernels_of<NeroRule, 0>(param, state); }

}  // namespace fastcurv
