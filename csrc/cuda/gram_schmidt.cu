// Which instances of the kernel serve which call.
#include "fastcurv.h"
#include "gram_schmidt.cuh"

namespace fastcurv {

CudaMatrixKernel gram_schmidt_cuda(Dtype dtype) {
  return dtype == Dtype::float64 ? gram_schmidt_kernel<double> : gram_schmidt_kernel<float>;
}

}  // namespace fastcurv
