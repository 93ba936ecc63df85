// What Python asks of a device before anything is launched on it.
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

}  // namespace fastcurv
