// What is asked of a device, and the one way of launching a kernel on it.
#include "fastcurv.h"
#include "launch.h"

namespace fastcurv {
namespace {

// Compiled for the architectures of all the kernels, and nothing but that.
__global__ void probe_kernel() {}

}  // namespace

const char* cuda_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int cuda_has_code_for(int device) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return reported(guard.error());
  cudaFuncAttributes attributes;
  return reported(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(probe_kernel)));
}

int cuda_multiprocessors(int device, int* count) {
  return reported(cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device));
}

// The code is that of cudaLaunchKernel, which unlike cudaGetLastError after `<<<>>>` does not mix it with what some
// earlier call left behind.
int cuda_launch(CudaKernel kernel, int blocks, int threads, const Args& args, int device, void* stream) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return reported(guard.error());
  void* parameters[] = {const_cast<Args*>(&args)};
  return reported(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(blocks), dim3(threads), parameters, 0,
                                   static_cast<cudaStream_t>(stream)));
}

}  // namespace fastcurv
