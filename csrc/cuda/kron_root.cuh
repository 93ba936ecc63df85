// Inverse roots of small symmetric positive definite matrices, one block to a matrix, by coupled Newton iteration: see
// ../cpu/kron_root.cpp for the algorithm. Three squares of doubles in shared memory are all that it needs.
#pragma once
#include "factors.cuh"
#include "squares.cuh"

namespace fastcurv {

template <typename T, int blocks>
struct KronRoot : Squares<blocks> {
  using Base = Squares<blocks>;
  using typename Base::Entries;
  using typename Base::Tile;
  // Eigenvalues of the size of rounding take 61 steps. What is left after the last is about the square of this.
  static constexpr int kMostSteps = 80;
  static constexpr double kSmall = 0x1p-27;
  // Beyond this, or its reciprocal, sums of squares are taken of a matrix times or over a power of two.
  static constexpr double kMuch = 0x1p900, kShift = 0x1p600;

  static __device__ __forceinline__ void run(const BlockFactor<T>& f, long long p, double* shared) {
    const Tile m = {shared}, x = {m.values + tile_size(blocks)}, t = {x.values + tile_size(blocks)};
    const double mean = f.mean_of_diagonal();
    double jitter = 0.0;
    for (int tries = 0; tries <= kJitters; ++tries) {
      __syncthreads();  // nobody still takes a sum, or stores a result
      if (load(f, *f.damping + jitter, m) > 0.0) return f.give_up(tries ? kNoInverse : kNotFinite);
      const double root = find(f, p, m, x, t);
      if (root > 0.0 && store(f, x, root) == 0.0) {
        if (threadIdx.x == 0) *f.info = tries;
        return;
      }
      jitter = jitter == 0.0 ? kJitter * mean : 10.0 * jitter;
    }
    __syncthreads();
    f.give_up(kNoInverse);
  }

 private:
  // out = left right, of symmetric matrices that commute: what is on and below the diagonal, mirrored. In what is not
  // symmetric rounding would grow.
  static __device__ __forceinline__ void multiply(const Tile& left, const Tile& right, const Tile& out, int n) {
    Entries product;
    product.template add_product<false>(left, right, n);
    __syncthreads();  // nobody still reads what is written now
    product.each([&](int i, int j, double value) {
      if (j <= i) out(i, j) = out(j, i) = value;
    });
    __syncthreads();
  }

  // What is on and below the diagonal, mirrored, with zeros around; returns how many elements are not finite.
  static __device__ __forceinline__ double load(const BlockFactor<T>& f, double shift, const Tile& to) {
    double infinite = 0.0;
    Entries().each([&](int i, int j, double) {
      const bool is_inside = i < f.n && j < f.n;
      const double value = !is_inside ? 0.0 : i < j ? f.from()[j * f.n + i] : f.from()[i * f.n + j];
      to(i, j) = is_inside && i == j ? value + shift : value;
      if (is_inside) infinite += !is_finite(f.from()[i * f.n + j]) || !is_finite(static_cast<T>(to(i, j)));
    });
    return block_sum(infinite);
  }

  // Every thread takes its own entries alone.
  static __device__ __forceinline__ double squares(const Tile& m) {
    double square = 0.0;
    Entries().each([&](int i, int j, double) { square += m(i, j) * m(i, j); });
    return block_sum(square);
  }

  // X over its factor at the start; returns that factor, or 0 if there is no root.
  static __device__ __forceinline__ double find(const BlockFactor<T>& f, long long p, const Tile& m, const Tile& x,
                                                const Tile& t) {
    const int n = static_cast<int>(f.n);
    const double powers = static_cast<double>(p);
    __syncthreads();
    double square = squares(m), unit = 1.0;
    if (!(square < kMuch) || square < 1.0 / kMuch) {  // what its terms are is beyond double, or nearly
      unit = square < 1.0 ? kShift : 1.0 / kShift;
      __syncthreads();
      Entries().each([&](int i, int j, double) { m(i, j) *= unit; });
      square = squares(m);
    }
    const double norm = square_root(square);
    if (!(norm > 0.0)) return 0.0;
    const double z = static_cast<double>(p + 1 < kNewtonStart ? p + 1 : kNewtonStart) / (2.0 * norm);
    __syncthreads();
    Entries().each([&](int i, int j, double) {
      m(i, j) *= z;
      x(i, j) = i == j && i < n ? 1.0 : 0.0;
    });
    for (int k = 0; k < kMostSteps; ++k) {
      __syncthreads();
      square = 0.0;
      Entries().each([&](int i, int j, double) {
        const double one = i == j && i < n ? 1.0 : 0.0;
        square += (m(i, j) - one) * (m(i, j) - one);
        t(i, j) = ((powers + 1.0) * one - m(i, j)) / powers;
      });
      const double error = square_root(block_sum(square));
      // No eigenvalue of the difference is larger than p, unless one of M is below zero.
      if (!(error <= (powers + 1.0) * static_cast<double>(n))) return 0.0;
      __syncthreads();
      multiply(x, t, x, n);
      if (error < kSmall) return pow(z, 1.0 / powers) * pow(unit, 1.0 / powers);
      for (long long q = p; q; q >>= 1) {
        if (q & 1) multiply(t, m, m, n);
        if (q > 1) multiply(t, t, t, n);
      }
    }
    return 0.0;
  }

  // What is on and below the diagonal, mirrored; returns how many elements are not finite.
  static __device__ __forceinline__ double store(const BlockFactor<T>& f, const Tile& x, double scale) {
    double infinite = 0.0;
    __syncthreads();
    Entries().each([&](int i, int j, double) {
      if (i >= f.n || j >= f.n) return;
      const T value = static_cast<T>(scale * (i < j ? x(j, i) : x(i, j)));
      f.to()[i * f.n + j] = value;
      infinite += !is_finite(value);
    });
    return block_sum(infinite);
  }
};

template <typename T>
__global__ void __launch_bounds__(kMatrixThreads, 1) kron_root_kernel(KronArgs args) {
  FC_DYNAMIC_SHARED(double, shared);
  const BlockFactor<T> f(args);
  if (*f.info == 0) return;
  if (f.n == 0 && threadIdx.x == 0) *f.info = 0;
  with_squares(f.n, [&](auto squares) { KronRoot<T, decltype(squares)::kBlocks>::run(f, args.p, shared); });
}

}  // namespace fastcurv
