// Which instances of the kernels serve which call.
#include "fastcurv.h"
#include "launch.h"
#include "lookahead.cuh"

namespace fastcurv {

CudaKernels lookahead_cuda(Dtype param, Dtype state, int) { return kernels_of<LookaheadRule, 0>(param, state); }

}  // namespace fastcurv
