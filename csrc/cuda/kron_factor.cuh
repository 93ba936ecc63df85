// Moving averages of second moments, M <- decay M + scale X^T Y: in a first launch a block sums the products of a tile
// of a matrix over its part of the samples, in a second one a block adds up a tile's sums, in order, and updates it.
// What is between them says whether all that is to be added is finite, so that nobody waits to know.
#pragma once
#include "kron.h"
#include "matrices.cuh"

namespace fastcurv {

template <typename Storage, typename Real>
struct KronFactor {
  using Out = typename Compute<Storage>::type;
  // A thread forms kEntries x kEntries entries of a tile; samples are brought into shared memory kDepth at a time.
  static constexpr int kEntries = 4, kDepth = 16, kTile = kSumTile;
  static constexpr int kAcross = kTile / kEntries;
  static_assert(kEntries * kEntries * kMatrixThreads == kTile * kTile && kMatrixThreads % kTile == 0);

  // Where a sample is: its row, or the first place of the image, and the first of the kernel in it.
  struct Row {
    long long begin;
    int y, x;
    bool is_there;
  };
  struct Shared {
    alignas(16) Real x[kDepth][kTile], y[kDepth][kTile];
    Row x_rows[kDepth], y_rows[kDepth];
  };

  // The matrix of this block, in shared memory, so that what is chosen of it needs no stack; and its part of it.
  struct Part {
    const Statistic& s;
    long long tile;
    int split, top, left;  // first row and column of the tile

    __device__ __forceinline__ Part(const StatisticArgs& args, bool has_splits, Statistic& shared) : s(shared) {
      long long block = blockIdx.x;
      int number = 0;
      for (; number + 1 < args.count; ++number) {
        const Statistic& candidate = args.statistics[number];
        const long long blocks = candidate.tiles() * (has_splits ? candidate.splits() : 1);
        if (block < blocks) break;
        block -= blocks;
      }
      if (threadIdx.x == 0) shared = args.statistics[number];
      __syncthreads();
      tile = block % s.tiles();
      split = static_cast<int>(block / s.tiles());
      long long down = 0, across = 0;
      if (s.is_symmetric()) {
        down = static_cast<long long>((square_root(8.0f * static_cast<float>(tile) + 1.0f) - 1.0f) * 0.5f);
        while (down * (down + 1) / 2 > tile) --down;  // the root may be off by rounding
        while ((down + 1) * (down + 2) / 2 <= tile) ++down;
        across = tile - down * (down + 1) / 2;
      } else {
        down = tile / s.tiles_along(s.columns());
        across = tile % s.tiles_along(s.columns());
      }
      top = static_cast<int>(down) * kTile;
      left = static_cast<int>(across) * kTile;
    }
    __device__ __forceinline__ Out* out() const { return in_global(static_cast<Out*>(s.factor)); }
    // The diagonal as it was, and the sums of a split of a tile.
    __device__ __forceinline__ Real* before() const { return in_global(static_cast<Real*>(s.work)); }
    __device__ __forceinline__ Real* sums(long long of_split, long long of_tile) const {
      return before() + s.diagonal() + (of_split * s.tiles() + of_tile) * kTileSums;
    }
  };

  // A pointer to global memory, which the compiler must be told.
  template <typename T>
  static __device__ __forceinline__ T* in_global(T* pointer) {
#if defined(__CUDA_ARCH__)
    __builtin_assume(__isGlobal(pointer));
#endif
    return pointer;
  }

  // First row and column of a thread's entries.
  static __device__ __forceinline__ int down() { return threadIdx.x / kAcross * kEntries; }
  static __device__ __forceinline__ int across() { return threadIdx.x % kAcross * kEntries; }

  static __device__ __forceinline__ void sum(const Part& p, Shared& shared) {
    const bool is_square = p.s.is_symmetric() && p.top == p.left;
    const Samples& other = p.s.is_symmetric() ? p.s.x : p.s.y;
    const long long splits = p.s.splits(), length = (p.s.count + splits * kDepth - 1) / (splits * kDepth) * kDepth;
    const long long begin = p.split * length, end = begin + length < p.s.count ? begin + length : p.s.count;
    const Real(*const right)[kTile] = is_square ? shared.x : shared.y;
    Real sums[kEntries][kEntries] = {};
    find_rows(p.s.x, begin, end, shared.x_rows);
    find_rows(other, begin, end, shared.y_rows);
    __syncthreads();
    for (long long first = begin; first < end; first += kDepth) {
      load_samples(p.s.x, p.s.has_ones, p.top, shared.x_rows, shared.x);
      if (!is_square) load_samples(other, p.s.has_ones, p.left, shared.y_rows, shared.y);
      __syncthreads();
      find_rows(p.s.x, first + kDepth, end, shared.x_rows);
      find_rows(other, first + kDepth, end, shared.y_rows);
#pragma unroll
      for (int k = 0; k < kDepth; ++k) {
        const Pack<Real, kEntries> a = load_pack<kEntries>(&shared.x[k][down()]);
        const Pack<Real, kEntries> b = load_pack<kEntries>(&right[k][across()]);
#pragma unroll
        for (int r = 0; r < kEntries; ++r) {
#pragma unroll
          for (int q = 0; q < kEntries; ++q) sums[r][q] = multiply_add(a.values[r], b.values[q], sums[r][q]);
        }
      }
      __syncthreads();
    }
    const Real scale = static_cast<Real>(p.s.scale), parts = static_cast<Real>(splits);
    bool is_finite = true;
    Real* const to = p.sums(p.split, p.tile);
#pragma unroll
    for (int r = 0; r < kEntries; ++r) {
      Pack<Real, kEntries> row;
#pragma unroll
      for (int q = 0; q < kEntries; ++q) {
        row.values[q] = sums[r][q];
        const Out most = static_cast<Out>(scale * (parts * sums[r][q]));  // if all parts are like this one
        is_finite = is_finite && most - most == Out(0);
      }
      store_pack(to + (down() + r) * kTile + across(), row);
    }
    if (!is_finite) *in_global(p.s.info) = kNotFinite;
    if (!p.s.is_symmetric() || p.tile > 0 || p.split > 0) return;
    for (long long i = threadIdx.x; i < p.s.rows(); i += kMatrixThreads) p.before()[i] = p.out()[i * p.s.rows() + i];
  }

  static __device__ __forceinline__ void update(const Part& p) {
    __shared__ Real mirrored[kTile][kTile + 1];
    const bool is_finite = *in_global(p.s.info) == 0;
    if (p.tile == 0) trace(p, is_finite);
    if (!is_finite) return;
    const long long rows = p.s.rows(), columns = p.s.columns();
    for (int e = threadIdx.x; e < kTile * kTile; e += kMatrixThreads) {
      const int r = e / kTile, q = e % kTile;
      const long long i = p.top + r, j = p.left + q;
      if (i >= rows || j >= columns || (p.s.is_symmetric() && j > i)) continue;
      Out* const at = p.out() + i * columns + j;
      const Out value = updated(p, *at, total(p, p.sums(0, p.tile) + e));
      *at = value;
      mirrored[q][r] = value;
    }
    if (!p.s.is_symmetric()) return;
    __syncthreads();
    for (int e = threadIdx.x; e < kTile * kTile; e += kMatrixThreads) {
      const int r = e / kTile, q = e % kTile;
      const long long i = p.left + r, j = p.top + q;
      if (i < j && j < rows) p.out()[i * rows + j] = static_cast<Out>(mirrored[r][q]);
    }
  }

 private:
  static __device__ __forceinline__ Real total(const Part& p, const Real* sums) {
    const long long splits = p.s.splits(), step = p.s.tiles() * kTileSums;
    Real result = Real(0);
    for (long long split = 0; split < splits; ++split) result += sums[split * step];
    return result;
  }

  static __device__ __forceinline__ Out updated(const Part& p, Real before, Real total) {
    const Real decay = static_cast<Real>(p.s.decay), added = static_cast<Real>(p.s.scale) * total;
    return static_cast<Out>(decay == Real(0) ? added : multiply_add(decay, before, added));  // 0: whatever stood there
  }

  // That of what the matrix is going to be: other blocks are writing it.
  static __device__ __forceinline__ void trace(const Part& p, bool is_finite) {
    double sum = 0.0;
    for (long long i = threadIdx.x; p.s.is_symmetric() && i < p.s.rows(); i += kMatrixThreads) {
      const Real before = p.before()[i];
      const long long row = i / kTile, tile = row * (row + 1) / 2 + row, place = i % kTile * (kTile + 1);
      sum += is_finite ? updated(p, before, total(p, p.sums(0, tile) + place)) : static_cast<Out>(before);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) *in_global(p.s.trace) = sum;
  }

  // Where samples first, ..., first + kDepth - 1 are, of those before `end`.
  static __device__ __forceinline__ void find_rows(const Samples& samples, long long first, long long end, Row* rows) {
    if (threadIdx.x >= kDepth) return;
    const long long number = first + threadIdx.x;
    Row row = {0, 0, 0, number < end};
    if (!samples.patches.channels) {
      row.begin = number * samples.columns;
    } else if (row.is_there) {
      const Patches& p = samples.patches;
      const long long line = number / p.outputs[1], image = line / p.outputs[0];
      row.begin = image * p.channels * p.height * p.width;
      row.y = static_cast<int>(line % p.outputs[0]) * p.stride[0] - p.padding[0];
      row.x = static_cast<int>(number % p.outputs[1]) * p.stride[1] - p.padding[1];
    }
    rows[threadIdx.x] = row;
  }

  // Columns left, ..., left + kTile - 1 of kDepth samples. A thread has a column of them.
  static __device__ __forceinline__ void load_samples(const Samples& samples, bool has_ones, int left, const Row* rows,
                                                      Real (*to)[kTile]) {
    const int column = threadIdx.x % kTile;
    const long long j = left + column;
    const Patches& p = samples.patches;
    const Storage* const values = in_global(static_cast<const Storage*>(samples.values));
    const bool is_inside = j < samples.columns;
    const Real outside = static_cast<Real>(has_ones && j == samples.columns);
    int y = 0, x = 0;
    long long plane = 0;
    if (p.channels) {
      const int place = static_cast<int>(j), size = p.kernel[0] * p.kernel[1];
      y = place / p.kernel[1] % p.kernel[0] * p.dilation[0];
      x = place % p.kernel[1] * p.dilation[1];
      plane = static_cast<long long>(place / size) * p.height * p.width;
    }
#pragma unroll
    for (int k = threadIdx.x / kTile; k < kDepth; k += kMatrixThreads / kTile) {
      const Row row = rows[k];
      Real value = row.is_there ? outside : Real(0);
      if (is_inside && row.is_there) {
        long long at = row.begin + j;
        bool is_image = true;
        if (p.channels) {
          const int v = row.y + y, h = row.x + x;
          is_image = v >= 0 && v < p.height && h >= 0 && h < p.width;
          at = row.begin + plane + static_cast<long long>(v) * p.width + h;
        }
        value = is_image ? static_cast<Real>(load(values[at])) : Real(0);
      }
      to[k][column] = value;
    }
  }
};

// The first launch, and the one that updates.
template <typename Storage, typename Real, bool updates>
__global__ void __launch_bounds__(kMatrixThreads, sizeof(Real) == 8 ? 2 : 3) kron_factor_kernel(StatisticArgs args) {
  using Op = KronFactor<Storage, Real>;
  __shared__ Statistic statistic;
  const typename Op::Part part(args, !updates, statistic);
  if constexpr (updates) {
    Op::update(part);
  } else {
    __shared__ typename Op::Shared shared;
    Op::sum(part, shared);
  }
}

}  // namespace fastcurv
