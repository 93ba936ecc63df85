// Which instances of the kernel serve which call.
#include "fastcurv.h"
#include "newton_schulz.cuh"

namespace fastcurv {

CudaMatrixKernel newton_schulz_cuda(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64: return newton_schulz_kernel<double>;
    case Dtype::bfloat16: return newton_schulz_kernel<bfloat16>;
    case Dtype::float16: return newton_schulz_kernel<float16>;
    case Dtype::float32: break;
  }
  return newton_schulz_kernel<float>;
}

}  // namespace fastcurv
