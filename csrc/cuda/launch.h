// What the launchers share: the right instances, the right device, and an error code of our own launch.
#pragma once
#include <cuda_runtime.h>

#include "fastcurv.h"
#include "kernels.cuh"

namespace fastcurv {

// Makes a device the current one of this thread, and the former one again at the end. Where they differ and nothing has
// used the former yet, the second cudaSetDevice makes a context there (hundreds of MB).
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : error_(cudaGetDevice(&former_)), device_(device) {
    if (error_ == cudaSuccess && former_ != device_) error_ = cudaSetDevice(device_);
  }
  ~DeviceGuard() {
    if (error_ == cudaSuccess && former_ != device_) cudaSetDevice(former_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t error() const { return error_; }

 private:
  int former_ = 0;
  cudaError_t error_;
  int device_;
};

// Takes an error that we return to our caller off the thread's record, where the next cudaGetLastError of somebody else
// would find it. An error that is not ours stays there: no call here asks for the record when it has none of its own.
inline int reported(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return static_cast<int>(error);
}

template <typename Rule>
CudaKernels kernels_of() {
  if constexpr (Rule::kSums > 0) {
    return {partials_kernel<Rule>, rows_kernel<Rule>, update_kernel<Rule>};
  } else {
    return {nullptr, nullptr, update_kernel<Rule>};
  }
}

// The same for the dtypes of a call.
template <template <typename, typename, int> class Rule, int variant>
CudaKernels kernels_of(Dtype param, Dtype state) {
  switch (param) {
    case Dtype::float64: return kernels_of<Rule<double, double, variant>>();
    case Dtype::bfloat16: return kernels_of<Rule<bfloat16, float, variant>>();
    case Dtype::float16: return kernels_of<Rule<float16, float, variant>>();
    case Dtype::float32: break;
  }
  return state == Dtype::bfloat16 ? kernels_of<Rule<float, bfloat16, variant>>()
                                  : kernels_of<Rule<float, float, variant>>();
}

}  // namespace fastcurv
