// What the device kernels on damped factors share, one block to a matrix.
#pragma once
#include "kron.h"
#include "matrices.cuh"

namespace fastcurv {

template <typename T>
__device__ __forceinline__ bool is_finite(T x) {
  return x - x == T(0);
}

// The factor of this block, in global memory, which the compiler must be told.
template <typename T>
struct BlockFactor : Factor {
  __device__ __forceinline__ explicit BlockFactor(const KronArgs& args) : Factor(args.factors[blockIdx.x]) {
#if defined(__CUDA_ARCH__)
    __builtin_assume(__isGlobal(in));
    __builtin_assume(__isGlobal(out));
    __builtin_assume(__isGlobal(info));
    __builtin_assume(__isGlobal(damping));
#endif
  }
  __device__ __forceinline__ const T* from() const { return static_cast<const T*>(in); }
  __device__ __forceinline__ T* to() const { return static_cast<T*>(out); }

  // Threads must meet before the next sum over the block.
  __device__ __forceinline__ double mean_of_diagonal() const {
    // Scaled by a power of two: no sum overflows, and no bit changes.
    constexpr double kMost = 1 << 20;
    double sum = 0.0;
    for (long long i = threadIdx.x; i < n; i += kMatrixThreads) sum += from()[i * n + i] / kMost;
    return block_sum(sum) / static_cast<double>(n) * kMost;
  }

  // Ends without a result of its own.
  __device__ __forceinline__ void give_up(int why) const {
    const T* const instead = static_cast<const T*>(previous);
    for (long long e = threadIdx.x; e < n * n; e += kMatrixThreads) to()[e] = instead ? instead[e] : T(0);
    if (threadIdx.x == 0) *info = why;
  }
};

}  // namespace fastcurv
