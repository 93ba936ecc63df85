// Which instances of the kernels serve which call.
#include "fastcurv.h"
#include "kron_factor.cuh"

namespace fastcurv {
namespace {

template <typename Storage, typename Real>
CudaStatisticKernels kernels_of() {
  return {kron_factor_kernel<Storage, Real, false>, kron_factor_kernel<Storage, Real, true>};
}

template <typename Storage>
CudaStatisticKernels kernels_of(Dtype sums) {
  return sums == Dtype::float64 ? kernels_of<Storage, double>() : kernels_of<Storage, float>();
}

}  // namespace

CudaStatisticKernels kron_factor_cuda(Dtype samples, Dtype sums) {
  switch (samples) {
    case Dtype::float64: return kernels_of<double, double>();
    case Dtype::bfloat16: return kernels_of<bfloat16>(sums);
    case Dtype::float16: return kernels_of<float16>(sums);
    case Dtype::float32: break;
  }
  return kernels_of<float>(sums);
}

}  // namespace fastcurv
