// The inverse of a symmetric positive definite matrix in one sweep over it.
//
// M = L L^T, L^-1 and L^-T L^-1 need n^3/3 flops each. They can be done together, block of rows K after block of rows,
// in one triangle in place (Bientinesi, Gunter and van de Geijn, 2008): rows above K hold what is known of the inverse,
// those below what is left of M on the right, and of L^-1 on the left. With L_K^-1, of the diagonal block alone,
//
//   Z = L_K^-1 [left of K | 1 | (below K)^T],    A_ij <- (A_ij, but 0 in rows and columns K) +- Z_i^T Z_j,
//
// minus below K. The last line has nearly all flops, as products of long strips.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "teams.h"
#include "tiles.h"

namespace fastcurv {

template <typename Real, Simd kLevel>
struct Sweep {
  using T = Tiles<Real, kLevel>;
  static constexpr long long kStrip = T::kStrip;
  // Rows of the innermost blocks; matrices that are swept by these alone; and rows of their blocks where they are not.
  static constexpr long long kInner = 8;
  static constexpr long long kOneLevel = 128;
  static constexpr long long kOuter = 32, kLarge = 1536, kLargeOuter = 64;
  // Columns that are all on the left of a block, in it, or on its right.
  static constexpr long long kPiece = std::min(kInner, kStrip);
  static_assert(kOuter % kStrip == 0 && kInner % T::kTall == 0 && kStrip % T::kTall == 0);

  // Elements of the room that a sweep over n rows needs beside the matrix, for each thread beyond the first.
  static constexpr long long kGathered = kLargeOuter * kStrip;
  static constexpr long long room(long long n) { return kLargeOuter * (n + kLargeOuter); }

  // Leaves the inverse on and below the diagonal; what is above is spoilt.
  //
  // n: rows, a multiple of kStrip; a: rows `stride` apart; z: room(n) elements, shared; gathered: kGathered, this
  // thread's own; is_definite: shared, true before, and false after if there was a pivot that was not above zero.
  static FC_INLINE void run(long long n, Real* a, long long stride, Real* z, Real* gathered, bool* is_definite,
                            const Team& team) {
    if (n <= kOneLevel) {
      if (team.rank == 0) call<kLevel, Steps>(n, a, stride, z, gathered, is_definite, false);
      team.wait();
      return;
    }
    const long long most = n > kLarge ? kLargeOuter : kOuter;
    Real* const block = z + kLargeOuter * n;
    for (long long begin = 0; begin < n; begin += most) {
      const long long count = std::min(most, n - begin);
      if (team.rank == 0) {
        for (long long i = 0; i < count; ++i) {
          std::copy_n(a + (begin + i) * stride + begin, i + 1, block + i * count);
        }
        call<kLevel, Steps>(count, block, count, z, gathered, is_definite, true);
      }
      team.wait();
      if (!*is_definite) return;
      call<kLevel, Step>(n, begin, count, block, a, stride, z, gathered, team, false);
    }
  }

 private:
  // The sweep in blocks of kInner; or, without the last product, of L^-1 alone.
  struct Steps {
    static FC_INLINE void run(long long n, Real* a, long long stride, Real* z, Real* gathered, bool* is_definite,
                              bool is_factor) {
      for (long long begin = 0; begin < n; begin += kInner) {
        Real inverse[kInner * kInner];
        if (!invert_factor(a + begin * stride + begin, stride, inverse)) {
          *is_definite = false;
          return;
        }
        call<kLevel, Step>(n, begin, kInner, inverse, a, stride, z, gathered, Team{0, 1}, is_factor);
      }
    }
  };

  // The inverse of the Cholesky factor of a block of kInner, by elimination in [block | 1]. Returns whether it has one.
  static FC_INLINE bool invert_factor(const Real* from, long long stride, Real* to) {
    Real rows[kInner][2 * kInner], pivots[kInner];
    for (long long i = 0; i < kInner; ++i) {
      for (long long j = 0; j < kInner; ++j) {
        rows[i][j] = from[std::max(i, j) * stride + std::min(i, j)];
        rows[i][kInner + j] = static_cast<Real>(i == j);
      }
    }
    // Only the reciprocal is in the way of the next pivot; roots are not.
    for (long long k = 0; k < kInner; ++k) {
      pivots[k] = rows[k][k];
      const Real reciprocal = 1 / pivots[k];
      for (long long i = k + 1; i < kInner; ++i) {
        const Real factor = rows[i][k] * reciprocal;
        for (long long j = 0; j < 2 * kInner; ++j) rows[i][j] -= factor * rows[k][j];
      }
    }
    bool is_definite = true;
    for (long long i = 0; i < kInner; ++i) {
      is_definite = is_definite && pivots[i] > 0;
      const Real scale = 1 / std::sqrt(pivots[i]);
      for (long long j = 0; j < kInner; ++j) to[i * kInner + j] = scale * rows[i][kInner + j];
    }
    return is_definite;
  }

  // The step of rows begin, ..., begin + count - 1. `inverse`: L_K^-1, of which nothing above the diagonal is read but
  // in squares of kTall on it.
  struct Step {
    static FC_INLINE void run(long long n, long long begin, long long count, const Real* inverse, Real* a,
                              long long stride, Real* z, Real* gathered, Team team, bool is_factor) {
      const long long strips = n / kStrip, end = begin + count;
      for (long long s = team.rank; s < strips; s += team.size) {
        gather(begin, count, a, stride, s * kStrip, gathered);
        for (long long r = 0; r < count; r += T::kTall) {
          typename T::Vector sums[T::kTall][T::kVectors];
          T::product(r + T::kTall, inverse + r * count, count, 1, gathered, sums);
          Real* const to = z + (s * count + r) * kStrip;
          for (int q = 0; q < T::kTall; ++q) {
            for (int v = 0; v < T::kVectors; ++v) *T::at(to + q * kStrip + v * T::kLanes) = sums[q][v];
          }
        }
      }
      team.wait();
      for (long long i = begin + team.rank; i < n; i += team.size) {
        Real* const row = a + i * stride;
        if (i >= end) {
          std::fill(row + begin, row + end, Real());
        } else if (!is_factor) {
          std::fill(row, row + end, Real());
        } else {
          for (long long j = 0; j < end; ++j) row[j] = z[(j / kStrip * count + i - begin) * kStrip + j % kStrip];
        }
      }
      team.wait();
      T::add_triangle(is_factor ? end : 0, n, count, z, a, stride, team,
                      [&](long long i) { return i < end ? Real(1) : Real(-1); });
      team.wait();
    }
  };

  // What Z is made of: columns j, ..., j + kStrip - 1 of rows K of the symmetric matrix, and one in K itself.
  static FC_INLINE void gather(long long begin, long long count, const Real* a, long long stride, long long j,
                               Real* to) {
    const long long end = begin + count;
    for (long long i = j; i < j + kStrip; i += kPiece) {
      Real* const piece = to + i - j;
      if (i < begin) {
        for (long long k = 0; k < count; ++k) std::copy_n(a + (begin + k) * stride + i, kPiece, piece + k * kStrip);
      } else if (i < end) {
        for (long long k = 0; k < count; ++k) {
          for (long long c = 0; c < kPiece; ++c) piece[k * kStrip + c] = static_cast<Real>(i + c == begin + k);
        }
      } else if constexpr (kPiece == kSquare) {
        for (long long k = 0; k < count; k += kSquare) {
          transpose_square(a + i * stride + begin + k, stride, piece + k * kStrip, kStrip);
        }
      } else {
        for (long long c = 0; c < kPiece; ++c) {
          for (long long k = 0; k < count; ++k) piece[k * kStrip + c] = a[(i + c) * stride + begin + k];
        }
      }
    }
  }
};

}  // namespace fastcurv
