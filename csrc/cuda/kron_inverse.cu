// Which instances of the kernel serve which call.
#include "fastcurv.h"
#include "kron_inverse.cuh"

namespace fastcurv {

CudaKronKernel kron_inverse_cuda(Dtype dtype) {
  return dtype == Dtype::float64 ? kron_inverse_kernel<double> : kron_inverse_kernel<float>;
}

}  // namespace fastcurv
