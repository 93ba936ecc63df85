// Inverses of symmetric positive definite matrices of any size, in float or double.
#include <algorithm>
#include <vector>

#include "../fastcurv.h"
#include "simd.h"
#include "sweep.h"

namespace fastcurv {
namespace {

// What the threads that do a matrix share: a padded copy of it, a sweep's room, and what they found.
template <typename Real>
struct Room {
  static constexpr long long kStrip = 64 / sizeof(Real), kMostRows = 64;

  Buffer<Real> a, z;
  std::vector<Buffer<Real>> gathered;  // each thread's
  std::vector<char> is_finite;         // to each thread
  bool is_definite = false;

  // For matrices of up to n rows.
  Room(long long n, int threads)
      : a(padded_rows<Real>(n) * padded_stride<Real>(n)),
        z(kMostRows * (padded_rows<Real>(n) + kMostRows)),
        is_finite(threads) {
    for (int t = 0; t < threads; ++t) gathered.emplace_back(kMostRows * kStrip);
  }

  bool all_finite(const Team& team) const {
    return std::all_of(is_finite.begin(), is_finite.begin() + team.size, [](char x) { return x != 0; });
  }
};

FC_INLINE bool is_infinite(float x) { return (float_to_bits(x) & 0x7f800000u) == 0x7f800000u; }
FC_INLINE bool is_infinite(double x) {
  unsigned long long bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return (bits & 0x7ff0000000000000ull) == 0x7ff0000000000000ull;
}

template <typename Real, Simd kLevel>
struct KronInverse {
  static constexpr long long kStrip = Room<Real>::kStrip;
  using Whole = Sweep<Real, kLevel>;
  static_assert(kStrip % Whole::kStrip == 0 && Room<Real>::kMostRows >= Whole::kLargeOuter);

  static FC_INLINE void run(const Factor* factor, Room<Real>* room, const Team* team) {
    const Factor& f = *factor;
    const long long n = f.n, padded = padded_rows<Real>(n), stride = padded_stride<Real>(n);
    const Real* const in = static_cast<const Real*>(f.in);
    Real* const a = room->a.begin();
    double mean = 0.0;
    for (long long i = 0; i < n; ++i) mean += static_cast<double>(in[i * n + i]) / static_cast<double>(n);
    double jitter = 0.0;
    for (int tries = 0; tries <= kJitters; ++tries) {
      room->is_finite[team->rank] = load(in, n, padded, static_cast<Real>(*f.damping + jitter), a, stride, *team);
      if (team->rank == 0) room->is_definite = true;
      team->wait();
      if (!room->all_finite(*team)) return give_up(f, kNotFinite, *team);
      Whole::run(padded, a, stride, room->z.begin(), room->gathered[team->rank].begin(), &room->is_definite, *team);
      const bool is_definite = room->is_definite;
      team->wait();  // before that is written again
      if (is_definite) {
        room->is_finite[team->rank] = store(a, stride, n, static_cast<Real*>(f.out), *team);
        team->wait();
        const bool is_finite = room->all_finite(*team);
        team->wait();
        if (is_finite) {
          if (team->rank == 0) *f.info = tries;
          return;
        }
      }
      jitter = jitter == 0.0 ? kJitter * mean : 10.0 * jitter;
    }
    give_up(f, kNoInverse, *team);
  }

 private:
  // The matrix and what is added to its diagonal; ones on the rest of the diagonal, which invert to themselves. Returns
  // whether all that this thread has seen is finite.
  static FC_INLINE bool load(const Real* in, long long n, long long padded, Real shift, Real* a, long long stride,
                             const Team& team) {
    int infinite = 0;
    for (long long i = team.rank; i < padded; i += team.size) {
      Real* const row = a + i * stride;
      if (i < n) {
        for (long long j = 0; j < n; ++j) infinite |= is_infinite(in[i * n + j]);
        std::copy_n(in + i * n, i + 1, row);
        row[i] += shift;
        infinite |= is_infinite(row[i]);
      } else {
        std::fill(row, row + i, Real());
        row[i] = 1;
      }
    }
    return !infinite;
  }

  // The inverse, which is on and below the diagonal of a. Returns whether all that this thread has seen is finite.
  static FC_INLINE bool store(const Real* a, long long stride, long long n, Real* out, const Team& team) {
    int infinite = 0;
    for (long long top = team.rank * kStrip; top < n; top += team.size * kStrip) {
      const long long bottom = std::min(n, top + kStrip);
      for (long long i = top; i < bottom; ++i) {
        for (long long j = 0; j <= i; ++j) infinite |= is_infinite(a[i * stride + j]);
        std::copy_n(a + i * stride, i + 1, out + i * n);
      }
      for (long long left = 0; left < bottom; left += kStrip) {
        for (long long j = left; j < std::min(bottom, left + kStrip); ++j) {
          for (long long i = std::max(top, j); i < bottom; ++i) out[j * n + i] = a[i * stride + j];
        }
      }
    }
    return !infinite;
  }

  static FC_INLINE void give_up(const Factor& f, int info, const Team& team) {
    Real* const out = static_cast<Real*>(f.out);
    if (team.rank == 0) {
      if (f.previous) {
        std::copy_n(static_cast<const Real*>(f.previous), f.n * f.n, out);
      } else {
        std::fill_n(out, f.n * f.n, Real());
      }
      *f.info = info;
    }
    team.wait();
  }
};

template <typename Real>
void run_list(const std::vector<Factor>& factors) {
  const auto function = Clones<KronInverse<Real, Simd::baseline>, KronInverse<Real, Simd::v3>,
                               KronInverse<Real, Simd::v4>>::template select<const Factor*, Room<Real>*, const Team*>();
  std::vector<double> costs;
  for (const Factor& f : factors) costs.push_back(*f.info == 0 ? 0.0 : static_cast<double>(f.n) * f.n * f.n);
  on_teams(
      costs,
      [&](const std::vector<size_t>& numbers, int threads) {
        long long n = 0;
        for (size_t number : numbers) n = std::max(n, factors[number].n);
        return Room<Real>(n, threads);
      },
      [&](size_t number, Room<Real>& room, const Team& team) {
        if (*factors[number].info != 0) function(&factors[number], &room, &team);
      });
}

}  // namespace

void kron_inverse_cpu(const std::vector<Factor>& factors, Dtype dtype) {
  if (dtype == Dtype::float64) return run_list<double>(factors);
  run_list<float>(factors);
}

}  // namespace fastcurv
