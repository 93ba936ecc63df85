// Eigenvalues and eigenvectors of a symmetric matrix that stays in the cache: Householder tridiagonalisation, then QL
// steps with implicit shifts (Golub and Van Loan, Matrix Computations, 8.3). About 9 n^3 flops.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "../numeric.h"

namespace fastcurv {

// Columns of the eigenvectors that rotations go over at a time, in registers.
constexpr long long kRotated = 32;

// Doubles of work space that symmetric_eigen needs; `stride` is the distance of two rows, a multiple of kRotated.
inline long long eigen_work(long long n, long long stride) { return n * stride + 4 * stride; }

// The inner product of two rows from an element on, where one of them is zero before it.
FC_INLINE double inner_product(const double* x, const double* y, long long first, long long stride) {
  using Lanes = double __attribute__((vector_size(64), aligned(8), may_alias));
  Lanes sums = {};
  for (long long j = first / 8 * 8; j < stride; j += 8) {
    sums += *reinterpret_cast<const Lanes*>(x + j) * *reinterpret_cast<const Lanes*>(y + j);
  }
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

// a = q t q^T with t tridiagonal: its diagonal, and below it. Row k of `reflectors` holds the vector of the k-th
// reflection, zero up to k, scaled so that the reflection is 1 - v v^T. Columns of `a` beyond n are zero.
FC_INLINE void tridiagonalise(long long n, long long stride, double* a, double* diagonal, double* below,
                              double* reflectors, double* p) {
  for (long long k = 0; k < n; ++k) {
    double* const v = reflectors + k * stride;
    diagonal[k] = a[k * stride + k];
    if (k + 1 >= n) break;
    const double* const row = a + k * stride;
    double square = 0.0;
    for (long long j = k + 1; j < n; ++j) square += row[j] * row[j];
    const double norm = std::sqrt(square), first = row[k + 1];
    below[k] = first > 0.0 ? -norm : norm;
    // |v|^2 = 2: v = (x - below e) / sqrt(norm (norm + |first|)).
    const double scale = norm > 0.0 ? 1.0 / std::sqrt(norm * (norm + std::fabs(first))) : 0.0;
    for (long long j = 0; j < stride; ++j) v[j] = j > k ? row[j] * scale : 0.0;
    v[k + 1] = (first - below[k]) * scale;
    if (scale == 0.0) continue;
    double inner = 0.0;
    for (long long i = k + 1; i < n; ++i) {
      p[i] = inner_product(a + i * stride, v, k + 1, stride);
      inner += p[i] * v[i];
    }
    for (long long j = k + 1; j < n; ++j) p[j] -= 0.5 * inner * v[j];
    for (long long i = k + 1; i < n; ++i) {
      double* const to = a + i * stride;
      const double vi = v[i], pi = p[i];
      for (long long j = k + 1; j < n; ++j) to[j] -= vi * p[j] + pi * v[j];
    }
  }
}

// q^T, from the reflections.
FC_INLINE void accumulate(long long n, long long stride, const double* reflectors, double* q) {
  for (long long i = 0; i < n; ++i) {
    for (long long j = 0; j < stride; ++j) q[i * stride + j] = i == j ? 1.0 : 0.0;
  }
  for (long long k = n - 2; k >= 0; --k) {
    const double* const v = reflectors + k * stride;
    for (long long i = k + 1; i < n; ++i) {
      double* const row = q + i * stride;
      const double sum = inner_product(row, v, k + 1, stride);
      for (long long j = k + 1; j < n; ++j) row[j] -= sum * v[j];
    }
  }
}

// Applies the rotations of rows (i, i + 1) for i = last - 1, ..., first: each row is read and written once.
FC_INLINE void rotate_rows(long long n, long long stride, double* q, long long first, long long last, const double* c,
                           const double* s) {
  for (long long j = 0; j < n; j += kRotated) {
    double carry[kRotated];
    for (int k = 0; k < kRotated; ++k) carry[k] = q[last * stride + j + k];
    for (long long i = last - 1; i >= first; --i) {
      double* const row = q + i * stride + j;
      const double ci = c[i], si = s[i];
      for (int k = 0; k < kRotated; ++k) {
        const double upper = row[k], lower = carry[k];
        row[stride + k] = si * upper + ci * lower;
        carry[k] = ci * upper - si * lower;
      }
    }
    for (int k = 0; k < kRotated; ++k) q[first * stride + j + k] = carry[k];
  }
}

// On return row k of `a` is the eigenvector of values[k], in no order. False if the steps do not converge. One
// eigenvalue may take more than a hundred of them, among others that are rounding; all together take two or three each.
FC_INLINE bool symmetric_eigen(long long n, long long stride, double* a, double* values, double* work) {
  double* const reflectors = work;
  double* const below = work + n * stride;
  double *const p = below + stride, *const c = p + stride, *const s = c + stride;
  tridiagonalise(n, stride, a, values, below, reflectors, p);
  accumulate(n, stride, reflectors, a);
  below[n - 1] = 0.0;
  long long trips = 0;
  for (long long l = 0; l < n; ++l) {
    for (;; ++trips) {
      long long m = l;
      for (; m + 1 < n; ++m) {
        const double size = std::fabs(values[m]) + std::fabs(values[m + 1]);
        if (std::fabs(below[m]) <= std::numeric_limits<double>::epsilon() * size) break;
      }
      if (m == l) break;
      if (trips == 100 * n) return false;
      double g = (values[l + 1] - values[l]) / (2.0 * below[l]);
      g = values[m] - values[l] + below[l] / (g + std::copysign(std::sqrt(g * g + 1.0), g));
      double sine = 1.0, cosine = 1.0, shift = 0.0;
      long long first = l;
      for (long long i = m - 1; i >= l; --i) {
        double f = sine * below[i];
        const double b = cosine * below[i], r = std::sqrt(f * f + g * g);
        below[i + 1] = r;
        if (r == 0.0) {  // the matrix falls apart here
          values[i + 1] -= shift;
          below[m] = 0.0;
          first = i + 1;
          break;
        }
        sine = f / r;
        cosine = g / r;
        g = values[i + 1] - shift;
        const double t = (values[i] - g) * sine + 2.0 * cosine * b;
        shift = sine * t;
        values[i + 1] = g + shift;
        g = cosine * t - b;
        c[i] = cosine;
        s[i] = sine;
      }
      rotate_rows(n, stride, a, first, m, c, s);
      if (first != l) continue;
      values[l] -= shift;
      below[l] = g;
      below[m] = 0.0;
    }
  }
  return true;
}

}  // namespace fastcurv
