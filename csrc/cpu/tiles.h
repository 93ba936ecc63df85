// Products of matrices by tiles that stay in registers.
//
// What is multiplied lies in strips: kStrip columns of row 0, then of row 1, and so on, then the next columns. A
// product X^T Y takes kTall columns of a strip of X and all of a strip of Y at a time.
#pragma once
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../numeric.h"
#include "simd.h"
#include "teams.h"

namespace fastcurv {

// Squares of eight are transposed in registers: element by element, vectors would be read from what is still on its way
// to memory in pieces.
constexpr long long kSquare = 8;

// to(j)[i] = from(i)[j] for i, j < kSquare.
template <typename Real, typename From, typename To>
FC_INLINE void transpose_square(const From& from, const To& to) {
  using Row __attribute__((vector_size(kSquare * sizeof(Real)))) = Real;
  using Index = std::conditional_t<sizeof(Real) == 4, int, long long>;
  using Mask __attribute__((vector_size(kSquare * sizeof(Index)))) = Index;
  Row rows[kSquare];
  for (int i = 0; i < kSquare; ++i) std::memcpy(&rows[i], from(i), sizeof(Row));
  const auto exchange = [&](int distance, const Mask& low, const Mask& high) FC_INLINED {
    for (int i = 0; i < kSquare; ++i) {
      if (i & distance) continue;
      const Row upper = rows[i], lower = rows[i + distance];
      rows[i] = __builtin_shuffle(upper, lower, low);
      rows[i + distance] = __builtin_shuffle(upper, lower, high);
    }
  };
  exchange(1, Mask{0, 8, 2, 10, 4, 12, 6, 14}, Mask{1, 9, 3, 11, 5, 13, 7, 15});
  exchange(2, Mask{0, 1, 8, 9, 4, 5, 12, 13}, Mask{2, 3, 10, 11, 6, 7, 14, 15});
  exchange(4, Mask{0, 1, 2, 3, 8, 9, 10, 11}, Mask{4, 5, 6, 7, 12, 13, 14, 15});
  for (int j = 0; j < kSquare; ++j) std::memcpy(to(j), &rows[j], sizeof(Row));
}

// to[j * to_stride + i] = from[i * from_stride + j] for i, j < kSquare.
template <typename Real>
FC_INLINE void transpose_square(const Real* from, long long from_stride, Real* to, long long to_stride) {
  transpose_square<Real>([&](int i) FC_INLINED { return from + i * from_stride; },
                         [&](int j) FC_INLINED { return to + j * to_stride; });
}

// to_ji = from_ij of rows i = top, ..., bottom - 1 and columns j <= i.
template <typename Real>
FC_INLINE void mirror_rows(const Real* from, long long from_stride, long long top, long long bottom, Real* to,
                           long long to_stride) {
  for (long long left = 0; left < bottom; left += kSquare) {
    for (long long row = top; row < bottom; row += kSquare) {
      const long long right = left + kSquare, end = std::min(bottom, row + kSquare);
      if (right <= row && end == row + kSquare) {
        transpose_square(from + row * from_stride + left, from_stride, to + left * to_stride + row, to_stride);
        continue;
      }
      for (long long j = left; j < right; ++j) {
        for (long long i = std::max(row, j); i < end; ++i) to[j * to_stride + i] = from[i * from_stride + j];
      }
    }
  }
}

template <typename Real, Simd kLevel>
struct Tiles {
  static constexpr int kBytes = kLevel == Simd::v4 ? 64 : kLevel == Simd::v3 ? 32 : 16;
  static constexpr int kTall = kLevel == Simd::v4 ? 8 : 4;
  static constexpr int kVectors = kLevel == Simd::v4 ? 1 : 2;
  static constexpr int kLanes = kBytes / static_cast<int>(sizeof(Real));
  static constexpr int kStrip = kLanes * kVectors;
  // Elements of strips that stay in the second cache while others pass by.
  static constexpr long long kCached = (192 << 10) / sizeof(Real);
  using Vector __attribute__((vector_size(kBytes), aligned(sizeof(Real)), may_alias)) = Real;

  static FC_INLINE Vector* at(Real* to) { return reinterpret_cast<Vector*>(to); }
  static FC_INLINE const Vector* at(const Real* from) { return reinterpret_cast<const Vector*>(from); }

  // sums = left^T right over `depth` rows. Column r of `left` is at left[r * across + k * down].
  static FC_INLINE void product(long long depth, const Real* left, long long across, long long down, const Real* right,
                                Vector (&sums)[kTall][kVectors]) {
    for (int r = 0; r < kTall; ++r) {
      for (int v = 0; v < kVectors; ++v) sums[r][v] = Vector{};
    }
    for (long long k = 0; k < depth; ++k) {
      for (int v = 0; v < kVectors; ++v) {
        const Vector x = *at(right + k * kStrip + v * kLanes);
        for (int r = 0; r < kTall; ++r) sums[r][v] += left[r * across + k * down] * x;
      }
    }
  }

  // to += sign left^T right, of kTall columns of one strip and all of another.
  static FC_INLINE void add(long long depth, const Real* left, const Real* right, Real sign, Real* to,
                            long long stride) {
    Vector sums[kTall][kVectors];
    product(depth, left, 1, kStrip, right, sums);
    for (int r = 0; r < kTall; ++r) {
      for (int v = 0; v < kVectors; ++v) *at(to + r * stride + v * kLanes) += sign * sums[r][v];
    }
  }

  // to_ij += X_i^T Y_j for all i < rows, j < columns, which are multiples of kStrip.
  static FC_INLINE void add_rectangle(long long rows, long long columns, long long depth, const Real* x, const Real* y,
                                      Real* to, long long stride, const Team& team) {
    const long long group = std::max(1ll, kCached / (depth * kStrip)) * kStrip;
    for (long long g = 0; g < columns; g += group) {
      for (long long s = team.rank * kStrip; s < rows; s += team.size * kStrip) {
        for (long long c = g; c < std::min(g + group, columns); c += kStrip) {
          for (long long i = s; i < s + kStrip; i += kTall) {
            add(depth, x + s * depth + i - s, y + c * depth, Real(1), to + i * stride + c, stride);
          }
        }
      }
    }
  }

  // to_ij += factor(i) Z_i^T Z_j for rows i = first, ..., n - 1 on and below the diagonal, and in some tiles above it.
  // Both are multiples of kTall, and n of kStrip.
  template <typename Factor>
  static FC_INLINE void add_triangle(long long first, long long n, long long depth, const Real* z, Real* to,
                                     long long stride, const Team& team, const Factor& factor) {
    const long long strips = n / kStrip, group = std::max(1ll, kCached / (depth * kStrip));
    for (long long g = 0; g < strips; g += group) {
      for (long long s = std::max(first / kStrip, g) + team.rank; s < strips; s += team.size) {
        for (long long c = g; c < std::min(g + group, s + 1); ++c) {
          for (long long i = std::max(first, s * kStrip); i < (s + 1) * kStrip; i += kTall) {
            add(depth, z + s * depth * kStrip + i % kStrip, z + c * depth * kStrip, factor(i),
                to + i * stride + c * kStrip, stride);
          }
        }
      }
    }
  }
};

}  // namespace fastcurv
