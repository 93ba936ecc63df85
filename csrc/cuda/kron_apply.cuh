// Products of matrices of any sizes, all of a launch together: a block does one tile after the other, of whatever
// product. Division and partial sums happen where a tile is stored.
#pragma once
#include "kron_apply.h"
#include "matrices.cuh"

namespace fastcurv {

template <typename T>
struct KronApply {
  // A thread forms kEntries x kEntries entries of a tile, from kDepth rows of its operands at a time.
  static constexpr int kEntries = 4, kTile = kProductTile, kDepth = 16;
  static constexpr int kLoads = kTile * kDepth / kMatrixThreads;
  static_assert(kEntries * kEntries * kMatrixThreads == kTile * kTile);

  struct Shared {
    // Rows are 16 bytes more than a tile apart: threads that store along k meet in few banks.
    alignas(16) T x[kDepth][kTile + 16 / sizeof(T)], y[kDepth][kTile + 16 / sizeof(T)];
  };

  // In global memory, which the compiler must be told.
  struct BlockProduct : Product {
    __device__ __forceinline__ explicit BlockProduct(const Product& product) : Product(product) {
#if defined(__CUDA_ARCH__)
      __builtin_assume(__isGlobal(x));
      __builtin_assume(__isGlobal(y));
      __builtin_assume(__isGlobal(out));
      __builtin_assume(__isGlobal(with));
      __builtin_assume(__isGlobal(row_values));
      __builtin_assume(__isGlobal(column_values));
      __builtin_assume(__isGlobal(partials));
#endif
    }
  };

  // An operand: element (k, i) is at from[k * down + i * across], and one of the two is 1.
  struct Operand {
    const T* from;
    long long down, across;
    int depth, columns;

    // Neighbouring threads have neighbours in memory.
    __device__ __forceinline__ int k_of(int e) const { return down == 1 ? e % kDepth : e / kTile; }
    __device__ __forceinline__ int i_of(int e) const { return down == 1 ? e / kDepth : e % kTile; }

    __device__ __forceinline__ void load(int begin, int left, T (&values)[kLoads]) const {
#pragma unroll
      for (int l = 0; l < kLoads; ++l) {
        const int e = l * kMatrixThreads + threadIdx.x, k = begin + k_of(e), i = left + i_of(e);
        values[l] = k < depth && i < columns ? from[k * down + i * across] : T(0);
      }
    }
    __device__ __forceinline__ void store(const T (&values)[kLoads], T (*to)[kTile + 16 / sizeof(T)]) const {
#pragma unroll
      for (int l = 0; l < kLoads; ++l) {
        const int e = l * kMatrixThreads + threadIdx.x;
        to[k_of(e)][i_of(e)] = values[l];
      }
    }
  };

  static __device__ __forceinline__ void run(const KronApplyArgs& args) {
    __shared__ Shared shared;
    int number = 0;
    for (int t = blockIdx.x; t < args.tiles; t += gridDim.x) {
      while (number + 1 < args.count && args.products[number + 1].first_tile <= t) ++number;
      tile(BlockProduct(args.products[number]), t - args.products[number].first_tile, shared);
      __syncthreads();  // before shared memory is written again
    }
  }

  // The sums of a layer, in the order of its tiles but for those of a block's threads; zeros where one is not finite.
  static __device__ __forceinline__ void sum(const Summed& s) {
    double sums[2] = {};
    for (long long p = threadIdx.x; p < s.count; p += kMatrixThreads) {
      sums[0] += s.partials[2 * p];
      sums[1] += s.partials[2 * p + 1];
    }
    total(sums);
    const bool is_finite = sums[0] - sums[0] == 0.0 && sums[1] - sums[1] == 0.0;
    if (threadIdx.x == 0) {
      s.products[0] = is_finite ? sums[0] : 0.0;
      s.products[1] = is_finite ? sums[1] : 0.0;
      *s.info = is_finite ? 0 : kNotFinite;
    }
    if (is_finite) return;
    for (long long e = threadIdx.x; e < s.numel; e += kMatrixThreads) static_cast<T*>(s.update)[e] = T(0);
  }

 private:
  static __device__ __forceinline__ void total(double (&sums)[2]) {
    sums[0] = block_sum(sums[0]);
    __syncthreads();
    sums[1] = block_sum(sums[1]);
    __syncthreads();
  }

  static __device__ __forceinline__ void tile(const BlockProduct& p, int number, Shared& shared) {
    const int columns = (p.columns + kTile - 1) / kTile, top = number / columns * kTile,
              left = number % columns * kTile;
    const int across = threadIdx.x % (kTile / kEntries) * kEntries, down = threadIdx.x / (kTile / kEntries) * kEntries;
    const Operand x = {static_cast<const T*>(p.x), p.x_depth, p.x_row, p.depth, p.rows};
    const Operand y = {static_cast<const T*>(p.y), p.y_depth, p.y_column, p.depth, p.columns};
    T sums[kEntries][kEntries] = {}, next_x[kLoads], next_y[kLoads];
    x.load(0, top, next_x);
    y.load(0, left, next_y);
    for (int begin = 0; begin < p.depth; begin += kDepth) {
      if (begin) __syncthreads();  // nobody reads the last ones
      x.store(next_x, shared.x);
      y.store(next_y, shared.y);
      __syncthreads();
      if (begin + kDepth < p.depth) {  // on their way while these are multiplied
        x.load(begin + kDepth, top, next_x);
        y.load(begin + kDepth, left, next_y);
      }
#pragma unroll
      for (int k = 0; k < kDepth; ++k) {
        const Pack<T, kEntries> a = load_pack<kEntries>(&shared.x[k][down]);
        const Pack<T, kEntries> b = load_pack<kEntries>(&shared.y[k][across]);
#pragma unroll
        for (int r = 0; r < kEntries; ++r) {
#pragma unroll
          for (int q = 0; q < kEntries; ++q) sums[r][q] = multiply_add(a.values[r], b.values[q], sums[r][q]);
        }
      }
    }
    store(p, number, top + down, left + across, sums);
  }

  static __device__ __forceinline__ void store(const BlockProduct& p, int number, int row, int column,
                                               const T (&sums)[kEntries][kEntries]) {
    const T scale = static_cast<T>(p.scale);
    double found[2] = {};
#pragma unroll
    for (int r = 0; r < kEntries; ++r) {
#pragma unroll
      for (int q = 0; q < kEntries; ++q) {
        const int i = row + r, j = column + q;
        if (i >= p.rows || j >= p.columns) continue;
        const long long at = static_cast<long long>(i) * p.columns + j;
        T value = sums[r][q] * scale;
        if (p.row_values) {
          const T divisor = T(1) + static_cast<const T*>(p.row_values)[i] * static_cast<const T*>(p.column_values)[j];
          // An infinite value would make what it divides zero: NaN instead, which will be noticed.
          value = divisor - divisor == T(0) ? value / divisor : divisor - divisor;
        }
        if (p.out) static_cast<T*>(p.out)[at] = value;
        if (p.partials) {
          const double wide = value;
          if (p.with) found[0] = multiply_add(wide, static_cast<double>(static_cast<const T*>(p.with)[at]), found[0]);
          if (p.out) found[1] = multiply_add(wide, wide, found[1]);
        }
      }
    }
    if (!p.partials) return;
    total(found);
    if (threadIdx.x == 0) {
      p.partials[2 * number] = found[0];
      p.partials[2 * number + 1] = found[1];
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(kMatrixThreads, kBlocksPerMultiprocessor) kron_apply_kernel(KronApplyArgs args) {
  if (args.tiles) {
    KronApply<T>::run(args);
  } else {
    for (int l = blockIdx.x; l < args.count; l += gridDim.x) KronApply<T>::sum(args.summed[l]);
  }
}

}  // namespace fastcurv
