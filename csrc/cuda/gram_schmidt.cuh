// Gram-Schmidt on the rows of each matrix of a list, one block to a matrix: see ../cpu/gram_schmidt.cpp for the
// algorithm. The output is the work space. It stays in the caches, and a thread writes columns that no other does.
#pragma once
#include "matrices.cuh"

namespace fastcurv {

constexpr int kPanelRows = 16;

template <typename T>
struct GramSchmidt {
  // The rows of the result, or its columns where there are fewer.
  struct Rows {
    T* values;
    long long row, step, length;
    __device__ __forceinline__ T& operator()(long long i, long long k) const { return values[i * row + k * step]; }
  };

  // What the threads of a block tell each other of a panel.
  struct Shared {
    T products[kPanelRows][kPanelRows];
    double norms[kPanelRows];
    int is_not_finite;
  };

  // Rows begin .. end - 1 less their projections on rows first .. last - 1, all at once; both are at most a panel. A
  // warp forms height x width products at a time.
  template <int height, int width>
  static __device__ __forceinline__ void project(const Rows& rows, int begin, int end, int first, int last,
                                                 Shared& shared) {
    const int lane = threadIdx.x % kWarp;
    const int across = (last - first + width - 1) / width, all = (end - begin + height - 1) / height * across;
    __syncthreads();  // rows are written, and the last products read
    for (int tile = threadIdx.x / kWarp; tile < all; tile += kMatrixThreads / kWarp) {
      const int i = begin + tile / across * height, j = first + tile % across * width;
      T sums[height * width] = {};
#pragma unroll 2
      for (long long k = lane; k < rows.length; k += kWarp) {
        T left[height], right[width];
#pragma unroll
        for (int r = 0; r < height; ++r) left[r] = i + r < end ? rows(i + r, k) : T(0);
#pragma unroll
        for (int q = 0; q < width; ++q) right[q] = j + q < last ? rows(j + q, k) : T(0);
#pragma unroll
        for (int r = 0; r < height; ++r) {
#pragma unroll
          for (int q = 0; q < width; ++q) sums[r * width + q] = multiply_add(left[r], right[q], sums[r * width + q]);
        }
      }
      add_lanes<height * width>(sums, kWarp);
#pragma unroll
      for (int r = 0; r < height; ++r) {
#pragma unroll
        for (int q = 0; q < width; ++q) {
          if (lane == 0 && i + r < end && j + q < last) {
            shared.products[i + r - begin][j + q - first] = sums[r * width + q];
          }
        }
      }
    }
    __syncthreads();
    for (long long k = threadIdx.x; k < rows.length; k += kMatrixThreads) {
      for (int i = begin; i < end; i += height) {
        T left[height];
#pragma unroll
        for (int r = 0; r < height; ++r) left[r] = i + r < end ? rows(i + r, k) : T(0);
        for (int j = first; j < last; ++j) {
          const T right = rows(j, k);
#pragma unroll
          for (int r = 0; r < height; ++r) {
            // Of rows that there are not, products are left over from others.
            left[r] = multiply_add(-shared.products[i + r - begin][j - first], right, left[r]);
          }
        }
#pragma unroll
        for (int r = 0; r < height; ++r) {
          if (i + r < end) rows(i + r, k) = left[r];
        }
      }
    }
  }

  // Takes rows begin .. end - 1 from the matrix and scales them to length one: Gram-Schmidt does not see the
  // difference. A warp for each.
  static __device__ __forceinline__ void load_rows(const BlockMatrix<T>& m, const Rows& rows, int begin, int end,
                                                   Shared& shared) {
    const int lane = threadIdx.x % kWarp;
    const T* const from = m.from();
    for (int i = begin + threadIdx.x / kWarp; i < end; i += kMatrixThreads / kWarp) {
      T most = T(0), nothing = T(0);
      for (long long k = lane; k < rows.length; k += kWarp) {
        const T value = from[i * rows.row + k * rows.step];
        most = maximum(most, value < T(0) ? -value : value);
        nothing += T(0) * value;
      }
      for (unsigned int w = kWarp / 2; w > 0; w /= 2) {
        most = maximum(most, __shfl_xor_sync(kWholeWarp, most, static_cast<int>(w)));
      }
      add_lanes<1>(&nothing, kWarp);
      if (lane == 0 && nothing != T(0)) shared.is_not_finite = 1;
      // Twice, so that no square overflows or vanishes.
      const T divisor = most > T(0) ? most : T(1);
      double square = 0.0;
      for (long long k = lane; k < rows.length; k += kWarp) {
        const double value = static_cast<double>(from[i * rows.row + k * rows.step] / divisor);
        square = multiply_add(value, value, square);
      }
      add_lanes<1>(&square, kWarp);
      const double length = square_root(square);
      if (lane == 0) shared.norms[i - begin] = length * static_cast<double>(most);
      const T scale = static_cast<T>(length > 0.0 ? 1.0 / length : 0.0);
      for (long long k = lane; k < rows.length; k += kWarp) {
        rows(i, k) = from[i * rows.row + k * rows.step] / divisor * scale;
      }
    }
    __syncthreads();
  }

  // Scales a row to length one, or to zero where it is not longer than `least`. Returns whether it is.
  static __device__ __forceinline__ bool normalize(const Rows& rows, int i, double least) {
    double square = 0.0;
    for (long long k = threadIdx.x; k < rows.length; k += kMatrixThreads) {
      const double value = static_cast<double>(rows(i, k));
      square = multiply_add(value, value, square);
    }
    const double length = square_root(block_sum(square));
    const T scale = static_cast<T>(length > least ? 1.0 / length : 0.0);
    for (long long k = threadIdx.x; k < rows.length; k += kMatrixThreads) rows(i, k) *= scale;
    return length > least;
  }

  static __device__ __forceinline__ void run(const BlockMatrix<T>& m, double floor) {
    __shared__ Shared shared;
    const int small = static_cast<int>(m.small());
    const Rows rows = {m.to(), m.is_wide() ? m.columns : 1, m.is_wide() ? 1 : m.columns, m.large()};
    const double unit = sizeof(T) == 8 ? 1.0 / (1ll << 53) : 1.0 / (1 << 24);
    const double zero =
        square_root(static_cast<double>(rows.length > kLeastLength ? rows.length : kLeastLength)) * unit;
    if (threadIdx.x == 0) shared.is_not_finite = 0;
    __syncthreads();
    int dependent = 0;
    for (int p = 0; p < small; p += kPanelRows) {
      const int end = p + kPanelRows < small ? p + kPanelRows : small;
      load_rows(m, rows, p, end, shared);
      if (shared.is_not_finite) return m.give_up(kNotFinite);
      for (int pass = 0; pass < 2; ++pass) {
        for (int j = 0; j < p; j += kPanelRows) project<4, 4>(rows, p, end, j, j + kPanelRows, shared);
        for (int i = p; i < end; ++i) {
          // Twice on the rows of the panel before it, the first time: those must be orthonormal, or the second time it
          // is too late.
          bool counts = true;
          for (int again = pass; again < 2; ++again) {
            project<1, 2>(rows, i, i + 1, p, i, shared);
            // From then on a row has length one, but for rounding. Zero divided by zero is a length that none exceeds.
            counts = normalize(rows, i, again ? kRounding : maximum(zero, floor / shared.norms[i - p]));
          }
          dependent += pass && !counts;
        }
      }
    }
    if (threadIdx.x == 0) *m.info = dependent;
  }
};

template <typename T>
__global__ void __launch_bounds__(kMatrixThreads, 2) gram_schmidt_kernel(MatrixArgs args) {
  GramSchmidt<T>::run(BlockMatrix<T>(args), args.floor);
}

}  // namespace fastcurv
