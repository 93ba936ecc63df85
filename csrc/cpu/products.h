// Products in double of matrices whose smaller side stays in the cache, panel by panel of the larger one.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "each_matrix.h"
#include "simd.h"

namespace fastcurv {

using Doubles = double __attribute__((vector_size(64), aligned(8), may_alias));

constexpr long long kPanel = 256;  // columns; a multiple of 32
constexpr long long kWide = 8;     // doubles in a vector

// Columns begin, begin + 1, ... of a matrix (or of its transpose, where that is wide) in double. Rows are padded by
// zeros to multiples of four, columns to kPanel.
template <typename Storage>
struct LoadPanel {
  static FC_INLINE void run(const Matrix* matrix, const void* values, long long begin, double* panel) {
    const Matrix& m = *matrix;
    const Storage* const from = static_cast<const Storage*>(values);
    const long long small = m.small(), width = std::min(kPanel, m.large() - begin);
    std::fill(panel, panel + padded(small, 4) * kPanel, 0.0);
    if (m.is_wide()) {
      for (long long i = 0; i < small; ++i) {
        const Storage* const row = from + i * m.columns + begin;
        for (long long k = 0; k < width; ++k) panel[i * kPanel + k] = static_cast<double>(load(row[k]));
      }
    } else {
      for (long long k = 0; k < width; ++k) {
        const Storage* const row = from + (begin + k) * m.columns;
        for (long long i = 0; i < small; ++i) panel[i * kPanel + k] = static_cast<double>(load(row[i]));
      }
    }
  }
};

template <typename Storage>
struct StorePanel {
  static FC_INLINE void run(const Matrix* matrix, const double* panel, long long begin, void* values) {
    using T = typename Compute<Storage>::type;
    const Matrix& m = *matrix;
    Storage* const to = static_cast<Storage*>(values);
    const long long small = m.small(), width = std::min(kPanel, m.large() - begin);
    if (m.is_wide()) {
      for (long long i = 0; i < small; ++i) {
        Storage* const row = to + i * m.columns + begin;
        for (long long k = 0; k < width; ++k) store(row[k], static_cast<T>(panel[i * kPanel + k]));
      }
    } else {
      for (long long k = 0; k < width; ++k) {
        Storage* const row = to + (begin + k) * m.columns;
        for (long long i = 0; i < small; ++i) store(row[i], static_cast<T>(panel[i * kPanel + k]));
      }
    }
  }
};

// Panels are read and written through pointers, so that the arithmetic is compiled once for all dtypes.
struct Panels {
  void (*load)(const Matrix*, const void*, long long, double*);
  void (*store)(const Matrix*, const double*, long long, void*);
  long long item_size;

  template <typename Storage>
  static Panels of() {
    return {Clones<LoadPanel<Storage>>::template select<const Matrix*, const void*, long long, double*>(),
            Clones<StorePanel<Storage>>::template select<const Matrix*, const double*, long long, void*>(),
            sizeof(Storage)};
  }
  static Panels of(Dtype dtype) {
    switch (dtype) {
      case Dtype::float64: return of<double>();
      case Dtype::bfloat16: return of<bfloat16>();
      case Dtype::float16: return of<float16>();
      case Dtype::float32: break;
    }
    return of<float>();
  }

  FC_INLINE void clear(const Matrix& m) const { std::memset(m.out, 0, m.rows * m.columns * item_size); }
};

// gram += panel panel^T, of which only blocks of four on and below the diagonal are kept.
FC_INLINE void add_gram(long long small, const double* panel, double* gram, long long stride) {
  for (long long i = 0; i < small; i += 4) {
    for (long long j = 0; j <= i; j += 4) {
      Doubles sums[4][4] = {};
      for (long long k = 0; k < kPanel; k += kWide) {
        Doubles left[4], right[4];
        for (int r = 0; r < 4; ++r) left[r] = *reinterpret_cast<const Doubles*>(panel + (i + r) * kPanel + k);
        for (int r = 0; r < 4; ++r) right[r] = *reinterpret_cast<const Doubles*>(panel + (j + r) * kPanel + k);
        for (int r = 0; r < 4; ++r) {
          for (int q = 0; q < 4; ++q) sums[r][q] += left[r] * right[q];
        }
      }
      for (int r = 0; r < 4; ++r) {
        for (int q = 0; q < 4; ++q) {
          const Doubles x = sums[r][q];
          gram[(i + r) * stride + j + q] += ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
        }
      }
    }
  }
}

// out = left panel, of which `columns` are wanted, with `left` small x small.
FC_INLINE void multiply(long long small, const double* left, long long stride, const double* panel, double* out,
                        long long columns = kPanel) {
  for (long long i = 0; i < small; i += 4) {
    for (long long j = 0; j < columns; j += 4 * kWide) {
      Doubles sums[4][4] = {};
      for (long long k = 0; k < small; ++k) {
        Doubles right[4];
        for (int q = 0; q < 4; ++q) right[q] = *reinterpret_cast<const Doubles*>(panel + k * kPanel + j + q * kWide);
        for (int r = 0; r < 4; ++r) {
          const double factor = left[(i + r) * stride + k];
          for (int q = 0; q < 4; ++q) sums[r][q] += factor * right[q];
        }
      }
      for (int r = 0; r < 4; ++r) {
        for (int q = 0; q < 4; ++q) *reinterpret_cast<Doubles*>(out + (i + r) * kPanel + j + q * kWide) = sums[r][q];
      }
    }
  }
}

// gram = G G^T, of a matrix or its transpose.
FC_INLINE void gram(const Panels& panels, const Matrix& m, const void* from, double* panel, double* gram,
                    long long stride) {
  const long long small = m.small();
  std::fill(gram, gram + padded(small, 4) * stride, 0.0);
  for (long long begin = 0; begin < m.large(); begin += kPanel) {
    panels.load(&m, from, begin, panel);
    add_gram(small, panel, gram, stride);
  }
  for (long long i = 0; i < small; ++i) {
    for (long long j = i + 1; j < small; ++j) gram[i * stride + j] = gram[j * stride + i];
  }
}

// to = factor G, or (factor G^T)^T.
FC_INLINE void apply(const Panels& panels, const Matrix& m, const void* from, const double* factor, long long stride,
                     double* panel, double* product, void* to) {
  for (long long begin = 0; begin < m.large(); begin += kPanel) {
    panels.load(&m, from, begin, panel);
    multiply(m.small(), factor, stride, panel, product, std::min(kPanel, m.large() - begin));
    panels.store(&m, product, begin, to);
  }
}

}  // namespace fastcurv
