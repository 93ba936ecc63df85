// Which instances of the kernel serve which call.
#include "fastcurv.h"
#include "kron_apply.cuh"

namespace fastcurv {

CudaKronApplyKernel kron_apply_cuda(Dtype dtype) {
  return dtype == Dtype::float64 ? kron_apply_kernel<double> : kron_apply_kernel<float>;
}

}  // namespace fastcurv
