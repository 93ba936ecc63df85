// Inverse p-th roots of symmetric positive definite matrices by coupled Newton iteration (Guo and Higham, 2006).
//
//   X_0 = z^(1/p) I,  M_0 = z A,    T = ((p + 1) I - M) / p,    X <- X T,  M <- T^p M,
//
// with z = min(p + 1, 5) / (2 ||A||): M tends to I, and X to A^(-1/p). All iterates are polynomials of A, and with that
// symmetric and commuting: half of each product is enough. Matrices lie in strips, as products want them.
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>
#include <vector>

#include "../fastcurv.h"
#include "factors.h"
#include "simd.h"
#include "tiles.h"

namespace fastcurv {
namespace {

// What the threads that do a matrix share.
template <typename Real>
struct Room {
  static constexpr int kMatrices = 4;
  Buffer<Real> matrices;
  std::vector<double> norms, errors;  // each thread's
  Finite finite;

  Room(long long n, int threads)
      : matrices(kMatrices * padded_rows<Real>(n) * padded_rows<Real>(n)),
        norms(threads),
        errors(threads),
        finite(threads) {}
};

FC_INLINE double largest(std::vector<double>* of_each, double mine, const Team& team) {
  (*of_each)[team.rank] = mine;
  team.wait();
  double result = 0.0;
  for (int t = 0; t < team.size; ++t) {
    // A NaN stays.
    if (!((*of_each)[t] <= result)) result = (*of_each)[t];
    if (result != result) break;
  }
  team.wait();  // before that is written again
  return result;
}

template <typename Real, Simd kLevel>
struct KronRoot {
  using T = Tiles<Real, kLevel>;
  static constexpr long long kStrip = T::kStrip;
  static constexpr long long kDepth = 512;  // of a product at a time: strips stay in the second cache
  // Eigenvalues of the size of rounding take 61 steps in double.
  static constexpr int kMostSteps = 80;
  // M is so near to the identity that after another step what is left, about the square, is rounding.
  static constexpr double kSmall = sizeof(Real) == 4 ? 0x1p-13 : 0x1p-27;
  // Beyond this, or its reciprocal, norms are taken of matrices times or over a power of two.
  static constexpr double kMuch = 0x1p1000, kShift = 0x1p128;

  static FC_INLINE void run(const Factor* factor, Room<Real>* room, const Team* team, long long p) {
    const Factor& f = *factor;
    const long long n = f.n, padded = padded_rows<Real>(n);
    attempt<Real>(f, *team, [&](Real shift) FC_INLINED {
      Real *m = room->matrices.begin(), *x = m + padded * padded, *t = x + padded * padded,
           *spare = t + padded * padded;
      const bool is_read = load(static_cast<const Real*>(f.in), n, padded, shift, m, *team);
      if (!room->finite.all(is_read, *team)) return kNotFinite;

      double norm = largest(&room->norms, row_sums(m, n, padded, 1.0, *team), *team), unit = 1.0;
      if (!(norm > 0.0)) return n ? kNoInverse : 0;
      if (!(norm < kMuch) || norm < 1.0 / kMuch) {  // then it, or z, may be beyond double
        unit = norm < 1.0 ? kShift : 1.0 / kShift;
        norm = largest(&room->norms, row_sums(m, n, padded, unit, *team), *team);
      }
      const double z = static_cast<double>(std::min(p + 1, kNewtonStart)) / (2.0 * norm);
      const double power = 1.0 / static_cast<double>(p), root = std::pow(z, power) * std::pow(unit, power);
      // A power of two apart from X, which would lose digits where it is small.
      int exponent = 0;
      start(n, padded, z, unit, std::frexp(root, &exponent), m, x, *team);
      bool is_done = false;
      for (int k = 0; k < kMostSteps && !is_done; ++k) {
        const double error = largest(&room->errors, newton(padded, p, m, t, *team), *team);
        if (!(error <= static_cast<double>(p + 1))) break;  // it grows only if an eigenvalue is below zero
        multiply(padded, x, t, spare, *team);
        std::swap(x, spare);
        is_done = error < kSmall;
        if (is_done) break;
        for (long long q = p; q; q >>= 1) {
          if (q & 1) {
            multiply(padded, t, m, spare, *team);
            std::swap(m, spare);
          }
          if (q > 1) {
            multiply(padded, t, t, spare, *team);
            std::swap(t, spare);
          }
        }
      }
      const bool is_stored = is_done && store(x, n, padded, exponent, static_cast<Real*>(f.out), *team);
      return room->finite.all(is_stored, *team) ? 0 : kNoInverse;
    });
  }

 private:
  // Row i of strip s of a matrix of `padded` rows.
  static FC_INLINE long long row_at(long long padded, long long s, long long i) { return (s * padded + i) * kStrip; }

  // M and X at the start. Padding is the identity, and stays so.
  static FC_INLINE void start(long long n, long long padded, double z, double unit, double root, Real* m, Real* x,
                              const Team& team) {
    for (long long s = team.rank; s < padded / kStrip; s += team.size) {
      for (long long e = row_at(padded, s, 0); e < row_at(padded, s + 1, 0); ++e) {
        m[e] = static_cast<Real>(z * (unit * static_cast<double>(m[e])));
        x[e] = Real();
      }
      for (long long c = 0; c < kStrip; ++c) {
        const long long diagonal = row_at(padded, s, s * kStrip + c) + c;
        x[diagonal] = static_cast<Real>(root);
        if (s * kStrip + c >= n) m[diagonal] = 1;
      }
    }
    team.wait();
  }

  // T, and how far M is from the identity: the largest entry of what this thread has of the difference, or NaN.
  static FC_INLINE double newton(long long padded, long long p, const Real* m, Real* t, const Team& team) {
    const Real divisor = static_cast<Real>(p), own = static_cast<Real>(p + 1);
    Bits largest =
        0;  // of sizes as whole numbers, which have their order, NaN above all: loops of those are vectorised
    for (long long s = team.rank; s < padded / kStrip; s += team.size) {
      const long long begin = row_at(padded, s, s * kStrip), end = begin + kStrip * kStrip;
      for (long long e = row_at(padded, s, 0); e < begin; ++e) {
        t[e] = -m[e] / divisor;
        largest = std::max(largest, size_bits(m[e]));
      }
      for (long long e = end; e < row_at(padded, s + 1, 0); ++e) {
        t[e] = -m[e] / divisor;
        largest = std::max(largest, size_bits(m[e]));
      }
      for (long long e = begin; e < end; ++e) {
        const bool is_diagonal = (e - begin) % (kStrip + 1) == 0;
        t[e] = ((is_diagonal ? own : Real()) - m[e]) / divisor;
        largest = std::max(largest, size_bits(is_diagonal ? m[e] - 1 : m[e]));
      }
    }
    team.wait();
    Real result;
    __builtin_memcpy(&result, &largest, sizeof result);
    return static_cast<double>(result);
  }
  using Bits = std::conditional_t<sizeof(Real) == 4, unsigned int, unsigned long long>;
  static FC_INLINE Bits size_bits(Real x) {
    Bits bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits & (~Bits(0) >> 1);
  }

  // The matrix, of which what is on and below the diagonal counts, and what is added to its diagonal; zeros behind it.
  // Returns whether all that this thread has seen is finite.
  static FC_INLINE bool load(const Real* in, long long n, long long padded, Real shift, Real* to, const Team& team) {
    int infinite = 0;
    for (long long s = team.rank; s < padded / kStrip; s += team.size) {
      for (long long i = 0; i < padded; ++i) {
        for (long long c = 0; c < kStrip; ++c) {
          const long long j = s * kStrip + c;
          Real value = 0;
          if (i < n && j < n) {
            infinite |= is_infinite(in[i * n + j]);
            value = in[std::max(i, j) * n + std::min(i, j)] + (i == j ? shift : Real());
            infinite |= is_infinite(value);
          }
          to[row_at(padded, s, i) + c] = value;
        }
      }
    }
    return !infinite;
  }

  // The largest sum of sizes in those rows that this thread has, which are columns as well, times a unit.
  static FC_INLINE double row_sums(const Real* a, long long n, long long padded, double unit, const Team& team) {
    double result = 0.0;
    for (long long s = team.rank; s < padded / kStrip; s += team.size) {
      double sums[kStrip] = {};
      for (long long i = 0; i < n; ++i) {
        for (long long c = 0; c < kStrip; ++c) {
          sums[c] += unit * std::abs(static_cast<double>(a[row_at(padded, s, i) + c]));
        }
      }
      result = std::max(result, *std::max_element(sums, sums + kStrip));
    }
    return result;
  }

  // out = x y, of symmetric matrices that commute: what is on and below the diagonal, mirrored.
  static FC_INLINE void multiply(long long padded, const Real* x, const Real* y, Real* out, const Team& team) {
    const long long strips = padded / kStrip;
    for (long long first = 0; first < padded; first += kDepth) {
      const long long depth = std::min(kDepth, padded - first), group = std::max(1ll, T::kCached / (depth * kStrip));
      for (long long g = 0; g < strips; g += group) {
        for (long long s = g + team.rank; s < strips; s += team.size) {
          for (long long c = g; c < std::min(g + group, s + 1); ++c) {
            for (long long i = 0; i < kStrip; i += T::kTall) {
              Real* const to = out + row_at(padded, c, s * kStrip + i);
              if (first == 0) std::fill_n(to, T::kTall * kStrip, Real());
              T::add(depth, x + row_at(padded, s, first) + i, y + row_at(padded, c, first), Real(1), to, kStrip);
            }
          }
        }
      }
      team.wait();  // the split of strips depends on the group
    }
    for (long long s = team.rank; s < strips; s += team.size) {
      for (long long c = 0; c <= s; ++c) {
        for (long long i = 0; i < kStrip; ++i) {
          const Real* const from = out + row_at(padded, c, s * kStrip + i);
          const long long end = c == s ? i : kStrip;
          for (long long j = 0; j < end; ++j) out[row_at(padded, s, c * kStrip + j) + i] = from[j];
        }
      }
    }
    team.wait();
  }

  // X times a power of two. Returns whether all that this thread has seen is finite.
  static FC_INLINE bool store(const Real* x, long long n, long long padded, int exponent, Real* out, const Team& team) {
    const double half = std::ldexp(1.0, exponent / 2), rest = std::ldexp(1.0, exponent - exponent / 2);
    int infinite = 0;
    for (long long i = team.rank; i < n; i += team.size) {
      for (long long j = 0; j < n; ++j) {
        out[i * n + j] =
            static_cast<Real>(half * static_cast<double>(x[row_at(padded, j / kStrip, i) + j % kStrip]) * rest);
        infinite |= is_infinite(out[i * n + j]);
      }
    }
    return !infinite;
  }
};

template <typename Real>
void run_list(const std::vector<Factor>& factors, long long p) {
  const auto function =
      Clones<KronRoot<Real, Simd::baseline>, KronRoot<Real, Simd::v3>,
             KronRoot<Real, Simd::v4>>::template select<const Factor*, Room<Real>*, const Team*, long long>();
  on_factors<Room<Real>>(factors,
                         [&](const Factor* f, int, Room<Real>* room, const Team* team) { function(f, room, team, p); });
}

}  // namespace

void kron_root_cpu(const std::vector<Factor>& factors, Dtype dtype, long long p) {
  if (dtype == Dtype::float64) return run_list<double>(factors, p);
  run_list<float>(factors, p);
}

}  // namespace fastcurv
