// What the device kernels on each matrix of a list share.
#pragma once
#include "common.cuh"
#include "matrices.h"

#ifndef FC_DYNAMIC_SHARED  // the host emulator has its own
#define FC_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#endif

namespace fastcurv {

// a b + c, rounded once. Dot products contract whatever the flags say: nobody asks their bits of another back end.
template <typename T>
__device__ __forceinline__ T multiply_add(T a, T b, T c) {
#if defined(__CUDA_ARCH__)
  return fma(a, b, c);
#else
  return __builtin_fma(a, b, c);
#endif
}

// The matrix of this block: input and output in global memory, which the compiler must be told.
template <typename Storage>
struct BlockMatrix : Matrix {
  __device__ __forceinline__ explicit BlockMatrix(const MatrixArgs& args) : Matrix(args.matrices[blockIdx.x]) {
#if defined(__CUDA_ARCH__)
    __builtin_assume(__isGlobal(in));
    __builtin_assume(__isGlobal(out));
    __builtin_assume(__isGlobal(info));
#endif
  }
  __device__ __forceinline__ const Storage* from() const { return static_cast<const Storage*>(in); }
  __device__ __forceinline__ Storage* to() const { return static_cast<Storage*>(out); }

  // Ends with a result of zero.
  __device__ __forceinline__ void give_up(int why) const {
    for (long long e = threadIdx.x; e < rows * columns; e += blockDim.x) to()[e] = Storage();
    if (threadIdx.x == 0) *info = why;
  }
};

// The sum over the threads of a block, the same in all of them. Between two calls they must meet elsewhere.
__device__ __forceinline__ double block_sum(double value) {
  __shared__ double sums[kMatrixThreads / kWarp];
  add_lanes<1>(&value, kWarp);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  double total = 0.0;
#pragma unroll
  for (unsigned int w = 0; w < kMatrixThreads / kWarp; ++w) total += sums[w];
  return total;
}

}  // namespace fastcurv
