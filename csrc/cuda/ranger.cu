// Which instances of the kernels serve which call.
#include "fastcurv.h"
#include "launch.h"
#include "ranger.cuh"

namespace fastcurv {

CudaKernels ranger_cuda(Dtype param, Dtype state, int) { return kernels_of<RangerRule, 0>(param, state); }

}  // namespace fastcurv
