// Products of matrices by tiles that stay in registers.
//
// What is multiplied lies in strips: kStrip columns of row 0, then of row 1, and so on, then the next columns. A
// product X^T Y takes kTall columns of a strip of X and all of a strip of Y at a time.
#pragma once
#include <algorithm>

#include "../numeric.h"
#include "simd.h"
#include "teams.h"

namespace fastcurv {

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
