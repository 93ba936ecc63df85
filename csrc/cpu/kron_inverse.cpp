// Inverses of symmetric positive definite matrices of any size, in float or double.
#include <algorithm>
#include <vector>

#include "../fastcurv.h"
#include "factors.h"
#include "lanes.h"
#include "simd.h"
#include "sweep.h"

namespace fastcurv {
namespace {

// What the threads that do a matrix share: a padded copy of it, a sweep's room, and what they found.
template <typename Real>
struct Room {
  static constexpr long long kStrip = 64 / sizeof(Real), kMostRows = 64;

  Buffer<Real> a, z, lanes;
  std::vector<Buffer<Real>> gathered;  // each thread's
  Finite finite;
  bool is_definite = false;

  // For matrices of up to n rows.
  Room(long long n, int threads)
      : a(padded_rows<Real>(n) * padded_stride<Real>(n)),
        z(kMostRows * (padded_rows<Real>(n) + kMostRows)),
        lanes(Lanes<Real>::kElements + Lanes<Real>::kRoom),
        finite(threads) {
    for (int t = 0; t < threads; ++t) gathered.emplace_back(kMostRows * kStrip);
  }
};

template <typename Real, Simd kLevel>
struct KronInverse {
  static constexpr long long kStrip = Room<Real>::kStrip;
  using Whole = Sweep<Real, kLevel>;
  static_assert(kStrip % Whole::kStrip == 0 && Room<Real>::kMostRows >= Whole::kLargeOuter);

  static FC_INLINE void run(const Factor* factors, int count, Room<Real>* room, const Team* team) {
    if (factors->n > Small::kMostRows) return run_large(*factors, room, team);
    if (team->rank == 0) run_small(factors, count, room->lanes.begin());
    team->wait();
  }

 private:
  using Small = Lanes<Real>;
  using Shifts = typename Small::Vector;
  struct Invert {
    static FC_INLINE void run(const Factor* factors, int count, const Shifts* shifts, Real* room, int* found) {
      Small::invert(factors, count, *shifts, room, found);
    }
  };

  static FC_INLINE void run_small(const Factor* factors, int count, Real* room) {
    Shifts shifts{};
    for (int l = 0; l < count; ++l) shifts[l] = static_cast<Real>(*factors[l].damping);
    int found[Small::kLanes];
    call<kLevel, Invert>(factors, count, &shifts, room, found);
    for (int l = 0; l < count; ++l) {
      *factors[l].info = 0;
      if (found[l] == 0) continue;
      attempt<Real>(factors[l], {0, 1}, [&](Real shift) FC_INLINED {
        int again;
        const Shifts alone = Shifts{} + shift;
        call<kLevel, Invert>(&factors[l], 1, &alone, room, &again);
        return again;
      });
    }
  }

  static FC_INLINE void run_large(const Factor& f, Room<Real>* room, const Team* team) {
    const long long n = f.n, padded = padded_rows<Real>(n), stride = padded_stride<Real>(n);
    Real* const a = room->a.begin();
    attempt<Real>(f, *team, [&](Real shift) FC_INLINED {
      if (team->rank == 0) room->is_definite = true;
      const bool is_read = load(static_cast<const Real*>(f.in), n, padded, shift, a, stride, *team);
      if (!room->finite.all(is_read, *team)) return kNotFinite;
      Whole::run(padded, a, stride, room->z.begin(), room->gathered[team->rank].begin(), &room->is_definite, *team);
      const bool is_definite = room->is_definite;
      const bool is_stored = is_definite && store(a, stride, n, static_cast<Real*>(f.out), *team);
      return room->finite.all(is_stored, *team) ? 0 : kNoInverse;
    });
  }

  // The matrix and what is added to its diagonal; ones on the rest of the diagonal, which invert to themselves. Returns
  // whether all that this thread has seen is finite.
  static FC_INLINE bool load(const Real* in, long long n, long long padded, Real shift, Real* a, long long stride,
                             const Team& team) {
    int infinite = 0;
    for (long long i = team.rank; i < padded; i += team.size) {
      Real* const row = a + i * stride;
      if (i < n) {
        for (long long j = 0; j < n; ++j) {
          row[j] = in[i * n + j];
          infinite |= is_infinite(row[j]);
        }
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
      mirror_rows(a, stride, top, bottom, out, n);
    }
    return !infinite;
  }
};

template <typename Real>
void run_list(const std::vector<Factor>& factors) {
  const auto function =
      Clones<KronInverse<Real, Simd::baseline>, KronInverse<Real, Simd::v3>,
             KronInverse<Real, Simd::v4>>::template select<const Factor*, int, Room<Real>*, const Team*>();
  on_factors<Room<Real>>(factors, function, Lanes<Real>::kMostRows, Lanes<Real>::kLanes);
}

}  // namespace

void kron_inverse_cpu(const std::vector<Factor>& factors, Dtype dtype) {
  if (dtype == Dtype::float64) return run_list<double>(factors);
  run_list<float>(factors);
}

}  // namespace fastcurv
