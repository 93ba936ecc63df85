// Inverses of small symmetric positive definite matrices of one size, one in each lane of vectors.
//
// The sweep of sweep.h, in blocks K of kBlock rows, of which every element is a vector: that of all the matrices. Here
// M = L D L^T, with ones on the diagonal of L, so that there are no roots:
//
//   Z = L_K^-1 [left of K | 1 | (below K)^T],    A_ij <- (A_ij, but 0 in rows and columns K) +- Z_i^T D_K^-1 Z_j.
#pragma once
#include <algorithm>

#include "factors.h"
#include "tiles.h"

namespace fastcurv {

template <typename Real>
struct Lanes {
  static constexpr int kLanes = kSquare, kBlock = 4;
  // Lists of larger ones gain too, up to 64 rows; but one of 64 alone, which costs what eight do, loses more.
  static constexpr long long kMostRows = 48;
  using Vector __attribute__((vector_size(kLanes * sizeof(Real)), may_alias)) = Real;
  using Flags = decltype(Vector() < Vector());

  // Triangles by rows, and what a square that ends outside of them spoils.
  static constexpr long long row(long long i) { return i * (i + 1) / 2; }
  static constexpr long long kElements = (row(kMostRows) + kSquare) * kLanes;
  static constexpr long long kRoom = kMostRows * kBlock * kLanes;

  // Writes the inverses of `count` matrices, of the same size, with what is added to their diagonals; and for each 0,
  // or kNotFinite or kNoInverse, where nothing is written.
  static FC_INLINE void invert(const Factor* factors, int count, const Vector& shifts, Real* room, int* found) {
    const long long n = factors->n, padded_n = padded(n, kBlock);
    auto* const a = reinterpret_cast<Vector*>(room);
    Flags infinite{}, failed{};
    load(factors, count, shifts, a, infinite);
    fill(n, padded_n, a);
    sweep(padded_n, a, reinterpret_cast<Vector*>(room + kElements), failed);
    for (long long k = 0; k < row(n); ++k) add_infinite(a[k], failed);
    for (int l = 0; l < count; ++l) found[l] = infinite[l] ? kNotFinite : failed[l] ? kNoInverse : 0;
    store(factors, count, a, found);
  }

 private:
  static FC_INLINE void add_infinite(const Vector& x, Flags& flags) { flags |= x - x != Vector{}; }

  // The triangles; and which matrices are not finite.
  static FC_INLINE void load(const Factor* factors, int count, const Vector& shifts, Vector* a, Flags& infinite) {
    const long long n = factors->n;
    const Real* in[kLanes];
    for (int l = 0; l < kLanes; ++l) in[l] = static_cast<const Real*>(factors[std::min(l, count - 1)].in);
    Vector above[kSquare];  // the diagonal: only looked at
    Real rests[kLanes][kSquare] = {};
    for (long long i = 0; i < n; ++i) {
      for (long long j = 0; j < n; j += kSquare) {
        const bool is_whole = j + kSquare <= n;
        if (!is_whole) {
          for (int l = 0; l < kLanes; ++l) {
            for (long long c = 0; c < n - j; ++c) rests[l][c] = in[l][i * n + j + c];
          }
        }
        Vector* const square = j <= i ? a + row(i) + j : above;
        transpose_square<Real>([&](int l) FC_INLINED { return is_whole ? in[l] + i * n + j : rests[l]; },
                               [&](int c) FC_INLINED { return reinterpret_cast<Real*>(square + c); });
        for (int c = 0; c < kSquare; ++c) add_infinite(square[c], infinite);
      }
      a[row(i) + i] += shifts;
      add_infinite(a[row(i) + i], infinite);
    }
  }

  // Rows of the unit matrix below, which invert to themselves.
  static FC_INLINE void fill(long long n, long long padded_n, Vector* a) {
    for (long long i = n; i < padded_n; ++i) {
      std::fill_n(a + row(i), i, Vector{});
      a[row(i) + i] = Vector{} + 1;
    }
  }

  // Leaves the inverses; and which have a pivot that is not above zero.
  static FC_INLINE void sweep(long long n, Vector* a, Vector* z, Flags& indefinite) {
    for (long long begin = 0; begin < n; begin += kBlock) {
      Vector inverse[kBlock][kBlock], reciprocals[kBlock];
      factor(begin, a, inverse, reciprocals, indefinite);
      multiply(n, begin, inverse, a, z);
      const long long end = begin + kBlock;
      for (long long i = begin; i < n; ++i) {
        if (i < end) {
          std::fill_n(a + row(i), i + 1, Vector{});
        } else {
          std::fill_n(a + row(i) + begin, kBlock, Vector{});
        }
      }
      for (long long i = 0; i < n; i += kRows) add(i, i < end ? Real(1) : Real(-1), reciprocals, z, a);
    }
  }

  // L_K^-1 and D_K^-1, by elimination in [block | 1].
  static FC_INLINE void factor(long long begin, const Vector* a, Vector (&inverse)[kBlock][kBlock],
                               Vector (&reciprocals)[kBlock], Flags& indefinite) {
    Vector block[kBlock][kBlock];
    for (int i = 0; i < kBlock; ++i) {
      for (int j = 0; j < kBlock; ++j) {
        block[i][j] = a[row(begin + std::max(i, j)) + begin + std::min(i, j)];
        inverse[i][j] = Vector{} + static_cast<Real>(i == j);
      }
    }
    for (int k = 0; k < kBlock; ++k) {
      indefinite |= ~(block[k][k] > Vector{});
      reciprocals[k] = 1 / block[k][k];
      for (int i = k + 1; i < kBlock; ++i) {
        const Vector ratio = block[i][k] * reciprocals[k];
        for (int j = k + 1; j < kBlock; ++j) block[i][j] -= ratio * block[k][j];
        for (int j = 0; j <= k; ++j) inverse[i][j] -= ratio * inverse[k][j];
      }
    }
  }

  // Z, by columns.
  static FC_INLINE void multiply(long long n, long long begin, const Vector (&inverse)[kBlock][kBlock], const Vector* a,
                                 Vector* z) {
    for (long long j = 0; j < n; ++j) {
      for (int r = 0; r < kBlock; ++r) {
        if (j >= begin && j < begin + kBlock) {
          z[j * kBlock + r] = inverse[r][j - begin];
          continue;
        }
        const auto element = [&](int s) FC_INLINED -> const Vector& {
          return j < begin ? a[row(begin + s) + j] : a[row(j) + begin + s];
        };
        Vector sum = element(r);
        for (int s = 0; s < r; ++s) sum += inverse[r][s] * element(s);
        z[j * kBlock + r] = sum;
      }
    }
  }

  // Rows that are updated together.
  static constexpr int kRows = 2;
  static_assert(kBlock % kRows == 0);

  // A_ij += sign Z_i^T D_K^-1 Z_j, for rows i, ..., i + kRows - 1.
  static FC_INLINE void add(long long i, Real sign, const Vector (&reciprocals)[kBlock], const Vector* z, Vector* a) {
    Vector scaled[kRows][kBlock];
    for (int q = 0; q < kRows; ++q) {
      for (int r = 0; r < kBlock; ++r) scaled[q][r] = sign * z[(i + q) * kBlock + r] * reciprocals[r];
    }
    Vector* const upper = a + row(i);
    Vector* const lower = a + row(i + 1);
    for (long long j = 0; j <= i; ++j) {
      const Vector* const column = z + j * kBlock;
      Vector sums[kRows] = {upper[j], lower[j]};
      for (int r = 0; r < kBlock; ++r) {
        const Vector x = column[r];
        for (int q = 0; q < kRows; ++q) sums[q] += scaled[q][r] * x;
      }
      upper[j] = sums[0];
      lower[j] = sums[1];
    }
    for (int r = 0; r < kBlock; ++r) lower[i + 1] += scaled[1][r] * z[(i + 1) * kBlock + r];
  }

  static FC_INLINE void store(const Factor* factors, int count, const Vector* a, const int* found) {
    const long long n = factors->n;
    Real* out[kLanes] = {};
    for (int l = 0; l < count; ++l) out[l] = found[l] == 0 ? static_cast<Real*>(factors[l].out) : nullptr;
    const bool is_every = std::find(out, out + kLanes, nullptr) == out + kLanes;
    Real rests[kLanes][kSquare];
    for (long long i = 0; i < n; ++i) {
      for (long long j = 0; j < n; j += kSquare) {
        const long long columns = std::min(kSquare, n - j);
        const bool is_whole = is_every && columns == kSquare;
        transpose_square<Real>(
            [&](int c) FC_INLINED {
              const long long column = j + std::min<long long>(c, columns - 1);
              return reinterpret_cast<const Real*>(a + (column <= i ? row(i) + column : row(column) + i));
            },
            [&](int l) FC_INLINED { return is_whole ? out[l] + i * n + j : rests[l]; });
        for (int l = 0; l < (is_whole ? 0 : count); ++l) {
          for (long long c = 0; out[l] && c < columns; ++c) out[l][i * n + j + c] = rests[l][c];
        }
      }
    }
  }
};

}  // namespace fastcurv
