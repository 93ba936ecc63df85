// Newton-Schulz steps on each matrix of a list, one block to a matrix: see ../cpu/newton_schulz.cpp for the algorithm.
// Three squares in shared memory are all that steps need.
#pragma once
#include "squares.cuh"

namespace fastcurv {

template <typename Storage, int blocks>
struct NewtonSchulz : Squares<blocks> {
  using Base = Squares<blocks>;
  using Base::kSide, Base::multiply, Base::trace_of;
  using typename Base::Entries;
  using typename Base::Tile;
  using T = typename Compute<Storage>::type;

  // Panels alternate between a tile and the one behind it, so that some threads may fill one while others still read
  // the other. By arithmetic: of pointers that are swapped the compiler does not know that they are to shared memory.
  static __device__ __forceinline__ Tile alternate(const Tile& tile, long long begin) {
    return {tile.values + static_cast<int>(begin / kSide & 1) * tile_size(blocks)};
  }

  // Visits columns begin, begin + 1, ... of the matrix, or of its transpose where that is wide; neighbouring threads
  // are neighbours in memory.
  template <typename Visit>
  static __device__ __forceinline__ void each_of_panel(const Matrix& m, long long begin, const Visit& visit) {
    for (int e = threadIdx.x; e < kSide * kSide; e += kMatrixThreads) {
      const int slow = e / kSide, fast = e % kSide;
      const int i = m.is_wide() ? slow : fast, k = m.is_wide() ? fast : slow;
      visit(i, k, i < m.small() && begin + k < m.large(), m.at(i, begin + k));
    }
  }
  static __device__ __forceinline__ void load_panel(const BlockMatrix<Storage>& m, long long begin, const Tile& panel) {
    const Storage* const from = m.from();
    each_of_panel(m, begin, [&](int i, int k, bool is_inside, long long at) {
      panel(i, k) = is_inside ? static_cast<double>(load(from[at])) : 0.0;
    });
    __syncthreads();
  }
  // The sum of the squares of what a thread has stored.
  static __device__ __forceinline__ double store_panel(const BlockMatrix<Storage>& m, const Tile& panel,
                                                       long long begin) {
    Storage* const to = m.to();
    double square = 0.0;
    each_of_panel(m, begin, [&](int i, int k, bool is_inside, long long at) {
      if (!is_inside) return;
      Storage value;
      store(value, static_cast<T>(panel(i, k)));
      to[at] = value;
      square += static_cast<double>(load(value)) * static_cast<double>(load(value));
    });
    return square;
  }

  static __device__ __forceinline__ void run(const BlockMatrix<Storage>& m, const MatrixArgs& args, double* shared) {
    const int small = static_cast<int>(m.small());
    const Tile r = {shared}, p = {r.values + tile_size(blocks)}, whole = {p.values + tile_size(blocks)};
    Entries gram;
    for (long long begin = 0; begin < m.large(); begin += kSide) {
      const Tile panel = alternate(p, begin);
      load_panel(m, begin, panel);
      gram.template add_product<true>(panel, panel, kSide);
    }
    gram.to(r);
    __syncthreads();
    double trace = trace_of(r, small);
    const bool is_finite = trace - trace == 0.0;
    if (!is_finite || !(trace > 0.0)) return m.give_up(!is_finite ? kNotFinite : args.spectral ? small : 0);
    if (!args.spectral) trace = maximum(trace, args.floor * args.floor);
    __syncthreads();  // nobody still takes the trace
    gram.each([&](int i, int j, double value) { r(i, j) = value / trace; });
    __syncthreads();

    // Of a matrix with trace one, from above: the trace of its 64th power, to the power 1/64, is too large by a factor
    // of small^(1/64) at the most. It is not below 64^-64, which is far from underflow.
    double largest = 1.0;
    if (args.spectral) {
      multiply(r, r, p, small);
      for (int k = 1; k < 6; ++k) multiply(p, p, p, small);
      largest = trace_of(p, small);
      for (int k = 0; k < 6; ++k) largest = square_root(largest);
      largest *= static_cast<double>(m.large()) / static_cast<double>(args.spectral);
    }
    const double first = 1.0 / square_root(trace * largest);
    gram.each([&](int i, int j, double) {
      r(i, j) /= largest;
      whole(i, j) = i == j && i < small ? first : 0.0;
    });
    __syncthreads();

    for (long long k = 0; k < args.count; ++k) {
      const double a = args.steps[k].a, b = args.steps[k].b, c = args.steps[k].c;
      multiply(r, r, p, small);
      gram.each([&](int i, int j, double) {
        p(i, j) = multiply_add(c, p(i, j), b * r(i, j)) + (i == j && i < small ? a : 0.0);
      });
      __syncthreads();
      multiply(p, whole, whole, small);
      if (k + 1 == args.count) break;
      multiply(p, r, r, small);
      multiply(p, r, r, small);
    }

    double square = 0.0;
    for (long long begin = 0; begin < m.large(); begin += kSide) {
      const Tile panel = alternate(r, begin);
      load_panel(m, begin, panel);
      multiply(whole, panel, panel, small);
      square += store_panel(m, panel, begin);
    }
    square = block_sum(square);
    if (threadIdx.x == 0) *m.info = args.spectral ? small - static_cast<int>(square + 0.5) : 0;
  }
};

template <typename Storage>
__global__ void __launch_bounds__(kMatrixThreads, 2) newton_schulz_kernel(MatrixArgs args) {
  FC_DYNAMIC_SHARED(double, shared);
  const BlockMatrix<Storage> m(args);
  with_squares(m.small(),
               [&](auto squares) { NewtonSchulz<Storage, decltype(squares)::kBlocks>::run(m, args, shared); });
}

}  // namespace fastcurv
