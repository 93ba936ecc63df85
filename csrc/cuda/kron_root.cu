// Which instances of the kernel serve which call.
#include "fastcurv.h"
#include "kron_root.cuh"

namespace fastcurv {

CudaKronKernel kron_root_cuda(Dtype dtype) {
  return dtype == Dtype::float64 ? kron_root_kernel<double> : kron_root_kernel<float>;
}

}  // namespace fastcurv
