// Inverses of symmetric positive definite matrices, one block to a matrix, in one sweep: see ../cpu/sweep.h for the
// algorithm. The output is where it happens; what a block of rows is multiplied to lies in shared memory.
#pragma once
#include "factors.cuh"

namespace fastcurv {

template <typename T>
struct KronInverse {
  // A thread forms kEntries x kEntries entries of a tile.
  static constexpr int kEntries = 4, kTile = kFactorTile;
  static_assert(kEntries * kEntries * kMatrixThreads == kTile * kTile);

  struct Shared {
    T block[kFactorRows][kFactorRows + 1], inverse[kFactorRows][kFactorRows + 1], reciprocals[kFactorRows];
    int is_definite, is_infinite;
  };

  using BlockFactor = fastcurv::BlockFactor<T>;

  static __device__ __forceinline__ void run(const BlockFactor& f, T* z) {
    __shared__ Shared shared;
    const double mean = f.mean_of_diagonal();
    double jitter = 0.0;
    for (int tries = 0; tries <= kJitters; ++tries) {
      if (threadIdx.x == 0) shared.is_definite = 1, shared.is_infinite = 0;
      __syncthreads();
      load(f, static_cast<T>(*f.damping + jitter), shared);
      __syncthreads();
      if (shared.is_infinite) return f.give_up(tries ? kNoInverse : kNotFinite);
      if (f.n <= most_rows(kFactorRows, sizeof(T))) {
        sweep<kFactorRows>(f, z, shared);
      } else {
        sweep<kFewRows>(f, z, shared);
      }
      if (shared.is_definite) {
        mirror(f, shared);
        __syncthreads();
        if (!shared.is_infinite) {
          if (threadIdx.x == 0) *f.info = tries;
          return;
        }
      }
      jitter = jitter == 0.0 ? kJitter * mean : 10.0 * jitter;
      __syncthreads();  // nobody still asks whether it is finite
    }
    f.give_up(kNoInverse);
  }

 private:
  static __device__ __forceinline__ void load(const BlockFactor& f, T shift, Shared& shared) {
    int infinite = 0;
    for (long long e = threadIdx.x; e < f.n * f.n; e += kMatrixThreads) {
      const long long i = e / f.n, j = e % f.n;
      const T value = f.from()[e] + (i == j ? shift : T(0));
      infinite |= !is_finite(value);
      f.to()[e] = value;
    }
    if (infinite) shared.is_infinite = 1;
  }

  static __device__ __forceinline__ void mirror(const BlockFactor& f, Shared& shared) {
    int infinite = 0;
    for (long long e = threadIdx.x; e < f.n * f.n; e += kMatrixThreads) {
      const long long i = e / f.n, j = e % f.n;
      if (j < i) f.to()[j * f.n + i] = f.to()[e];
      if (j <= i) infinite |= !is_finite(f.to()[e]);
    }
    if (infinite) shared.is_infinite = 1;
  }

  template <int kRows>
  static __device__ __forceinline__ void sweep(const BlockFactor& f, T* z, Shared& shared) {
    const int n = static_cast<int>(f.n), stride = static_cast<int>(padded_tile(f.n));
    for (int begin = 0; begin < n; begin += kRows) {
      const int count = begin + kRows < n ? kRows : n - begin;
      for (int e = threadIdx.x; e < kRows * kRows; e += kMatrixThreads) {
        const int i = e / kRows, j = e % kRows;
        if (j > i) continue;
        shared.block[i][j] = i < count ? f.to()[(begin + i) * f.n + begin + j] : static_cast<T>(i == j);
      }
      __syncthreads();
      if (threadIdx.x < kWarp) invert_factor<kRows>(shared);
      __syncthreads();
      if (!shared.is_definite) return;
      multiply<kRows>(f, z, stride, begin, count, shared);
      __syncthreads();
      update<kRows>(f, z, stride, begin, begin + count);
      __syncthreads();
    }
  }

  // The inverse of the Cholesky factor of the diagonal block, by one warp.
  template <int kRows>
  static __device__ __forceinline__ void invert_factor(Shared& shared) {
    const int lane = threadIdx.x;
    for (int j = 0; j < kRows; ++j) {
      const T pivot = shared.block[j][j];
      const T reciprocal = T(1) / square_root(pivot);
      __syncwarp();  // all have the pivot
      if (lane == 0) {
        shared.reciprocals[j] = reciprocal;
        if (!(pivot > T(0))) shared.is_definite = 0;
      }
      if (lane >= j && lane < kRows) shared.block[lane][j] *= reciprocal;
      __syncwarp();
      if (lane < kRows) {
        const T minus = -shared.block[lane][j];
        for (int k = j + 1; k <= lane; ++k) {
          shared.block[lane][k] = multiply_add(minus, shared.block[k][j], shared.block[lane][k]);
        }
      }
      __syncwarp();
    }
    if (lane >= kRows) return;
    for (int i = 0; i < kRows; ++i) {  // a lane has a column, from the diagonal down
      T sum = static_cast<T>(i == lane);
      for (int k = lane; k < i; ++k) sum = multiply_add(-shared.block[i][k], shared.inverse[k][lane], sum);
      shared.inverse[i][lane] = i < lane ? T(0) : sum * shared.reciprocals[i];
    }
  }

  // Z, with zeros up to its stride. A thread has a column.
  template <int kRows>
  static __device__ __forceinline__ void multiply(const BlockFactor& f, T* z, int stride, int begin, int count,
                                                  const Shared& shared) {
    for (int j = threadIdx.x; j < stride; j += kMatrixThreads) {
      T column[kRows];
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        column[k] = k >= count || j >= f.n ? T(0)
                    : j < begin            ? f.to()[(begin + k) * f.n + j]
                    : j >= begin + count   ? f.to()[j * f.n + begin + k]
                                           : static_cast<T>(k == j - begin);
      }
#pragma unroll 1  // or the compiler keeps more of the inverse than it has registers for
      for (int r = 0; r < kRows; ++r) {
        T sum = T(0);
#pragma unroll
        for (int k = 0; k < kRows; ++k) sum = multiply_add(shared.inverse[r][k], column[k], sum);
        z[r * stride + j] = sum;
      }
    }
  }

  // A_ij +- Z_i^T Z_j on and below the diagonal, without what stands in rows and columns begin, ..., end - 1.
  template <int kRows>
  static __device__ __forceinline__ void update(const BlockFactor& f, const T* z, int stride, int begin, int end) {
    const int across = threadIdx.x % (kTile / kEntries) * kEntries, down = threadIdx.x / (kTile / kEntries) * kEntries;
    for (int top = 0; top < stride; top += kTile) {
      for (int left = 0; left <= top; left += kTile) {
        T sums[kEntries][kEntries] = {};
#pragma unroll 4
        for (int k = 0; k < kRows; ++k) {
          const Pack<T, kEntries> x = load_pack<kEntries>(z + k * stride + top + down);
          const Pack<T, kEntries> y = load_pack<kEntries>(z + k * stride + left + across);
#pragma unroll
          for (int r = 0; r < kEntries; ++r) {
#pragma unroll
            for (int q = 0; q < kEntries; ++q) sums[r][q] = multiply_add(x.values[r], y.values[q], sums[r][q]);
          }
        }
#pragma unroll
        for (int r = 0; r < kEntries; ++r) {
          const int i = top + down + r;
#pragma unroll
          for (int q = 0; q < kEntries; ++q) {
            const int j = left + across + q;
            if (i >= f.n || j > i) continue;
            T* const at = f.to() + i * f.n + j;
            const bool is_new = (i >= begin && i < end) || (j >= begin && j < end);
            const T old = is_new ? T(0) : *at;
            *at = i < end ? old + sums[r][q] : old - sums[r][q];
          }
        }
      }
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(kMatrixThreads, sizeof(T) == 8 ? 1 : 2) kron_inverse_kernel(KronArgs args) {
  FC_DYNAMIC_SHARED(double, shared);
  const typename KronInverse<T>::BlockFactor f(args);
  if (*f.info != 0) KronInverse<T>::run(f, reinterpret_cast<T*>(shared));
}

}  // namespace fastcurv
