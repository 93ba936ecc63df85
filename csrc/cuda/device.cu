// What is asked of a device, and the one way of launching a kernel on it.
#include "fastcurv.h"
#include "launch.h"

namespace fastcurv {
namespace {

// Compiled for the architectures of all the kernels, and nothing but that.
__global__ void probe_kernel() {}

// The code is that of cudaLaunchKernel, which unlike cudaGetLastError after `<<<>>>` does not mix it with what some
// earlier call left behind.
int launch(const void* kernel, int blocks, int threads, int shared_bytes, const void* args, int device, void* stream) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return reported(guard.error());
  if (shared_bytes > kSharedBytes) {
    // Always the same number, for another thread may be about to launch the kernel: all that is left beside what the
    // kernel has anyway.
    cudaFuncAttributes attributes;
    cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) return reported(error);
    const int most = kMostSharedBytes - static_cast<int>(attributes.sharedSizeBytes);
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (error != cudaSuccess) return reported(error);
  }
  void* parameters[] = {const_cast<void*>(args)};
  return reported(cudaLaunchKernel(kernel, dim3(blocks), dim3(threads), parameters, shared_bytes,
                                   static_cast<cudaStream_t>(stream)));
}

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

int cuda_launch(CudaKernel kernel, int blocks, int threads, const Args& args, int device, void* stream) {
  return launch(reinterpret_cast<const void*>(kernel), blocks, threads, 0, &args, device, stream);
}

int cuda_launch(CudaMatrixKernel kernel, int blocks, int shared_bytes, const MatrixArgs& args, int device,
                void* stream) {
  return launch(reinterpret_cast<const void*>(kernel), blocks, kMatrixThreads, shared_bytes, &args, device, stream);
}

int cuda_launch(CudaKronKernel kernel, int blocks, int shared_bytes, const KronArgs& args, int device, void* stream) {
  return launch(reinterpret_cast<const void*>(kernel), blocks, kMatrixThreads, shared_bytes, &args, device, stream);
}

int cuda_launch(CudaStatisticKernel kernel, int blocks, const StatisticArgs& args, int device, void* stream) {
  return launch(reinterpret_cast<const void*>(kernel), blocks, kMatrixThreads, 0, &args, device, stream);
}

int cuda_launch(CudaKronApplyKernel kernel, int blocks, const KronApplyArgs& args, int device, void* stream) {
  return launch(reinterpret_cast<const void*>(kernel), blocks, kMatrixThreads, 0, &args, device, stream);
}

}  // namespace fastcurv
