// Small square matrices in shared memory, in double: a product is formed in registers, 16 entries to a thread, and may
// then take the place of a factor.
#pragma once
#include "matrices.cuh"

namespace fastcurv {

template <int blocks>
struct Squares {
  static constexpr int kBlocks = blocks, kSide = kBlockSide * blocks, kStride = kSide + 1;

  // A square matrix in shared memory, or as many columns of the one in global memory; zero where there are less.
  struct Tile {
    double* values;
    __device__ __forceinline__ double& operator()(int i, int k) const { return values[i * kStride + k]; }
  };

  // A thread's entries of a square.
  struct Entries {
    double values[blocks][blocks] = {};

    template <typename Visit>
    __device__ __forceinline__ void each(const Visit& visit) {
      const int row = threadIdx.x / kBlockSide, column = threadIdx.x % kBlockSide;
#pragma unroll
      for (int r = 0; r < blocks; ++r) {
#pragma unroll
        for (int q = 0; q < blocks; ++q) visit(row + kBlockSide * r, column + kBlockSide * q, values[r][q]);
      }
    }
    __device__ __forceinline__ void to(const Tile& tile) {
      each([&](int i, int j, double value) { tile(i, j) = value; });
    }

    // Adds left right, or left right^T.
    template <bool is_transposed>
    __device__ __forceinline__ void add_product(const Tile& left, const Tile& right, int depth) {
      const int row = threadIdx.x / kBlockSide, column = threadIdx.x % kBlockSide;
#pragma unroll 2
      for (int k = 0; k < depth; ++k) {
        double a[blocks], b[blocks];
#pragma unroll
        for (int r = 0; r < blocks; ++r) {
          const int j = column + kBlockSide * r;
          a[r] = left(row + kBlockSide * r, k);
          b[r] = is_transposed ? right(j, k) : right(k, j);
        }
#pragma unroll
        for (int r = 0; r < blocks; ++r) {
#pragma unroll
          for (int q = 0; q < blocks; ++q) values[r][q] = multiply_add(a[r], b[q], values[r][q]);
        }
      }
    }
  };

  // out = left right; `out` may be one of them.
  static __device__ __forceinline__ void multiply(const Tile& left, const Tile& right, const Tile& out, int small) {
    Entries product;
    product.template add_product<false>(left, right, small);
    __syncthreads();  // nobody still reads what is written now
    product.to(out);
    __syncthreads();
  }

  // All threads take it: that is no slower than if one did.
  static __device__ __forceinline__ double trace_of(const Tile& tile, int small) {
    double trace = 0.0;
    for (int i = 0; i < small; ++i) trace += tile(i, i);
    return trace;
  }
};

// Calls run(Squares<blocks>()) with squares that are large enough for some rows.
template <typename Run>
__device__ __forceinline__ void with_squares(long long rows, const Run& run) {
  static_assert(kMostBlocks == 4, "a case for each");
  switch ((rows + kBlockSide - 1) / kBlockSide) {
    case 1: return run(Squares<1>());
    case 2: return run(Squares<2>());
    case 3: return run(Squares<3>());
    case 4: return run(Squares<4>());
  }
}

}  // namespace fastcurv
