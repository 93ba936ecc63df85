// What the launchers share: the right device, and an error code of our own launch.
#pragma once
#include <cuda_runtime.h>

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

// Launches kernel(args) and returns a CUDA error code. It is that of cudaLaunchKernel, which unlike cudaGetLastError
// after `<<<>>>` does not mix it with what some earlier call left behind.
template <typename Args>
int launch(void (*kernel)(Args), int blocks, int threads, const Args& args, int device, void* stream) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return reported(guard.error());
  void* parameters[] = {const_cast<Args*>(&args)};
  return reported(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(blocks), dim3(threads), parameters, 0,
                                   static_cast<cudaStream_t>(stream)));
}

}  // namespace fastcurv
