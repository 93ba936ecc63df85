// What the ops on damped factors share: who is done again with jitter, and what is written for those that fail.
#pragma once
#include <algorithm>
#include <vector>

#include "../kron.h"
#include "teams.h"

namespace fastcurv {

FC_INLINE bool is_infinite(float x) { return (float_to_bits(x) & 0x7f800000u) == 0x7f800000u; }
FC_INLINE bool is_infinite(double x) {
  unsigned long long bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return (bits & 0x7ff0000000000000ull) == 0x7ff0000000000000ull;
}

// Whether what each thread of a team has seen is finite, told to all of them.
class Finite {
 public:
  explicit Finite(int threads) : seen_(threads) {}

  bool all(bool mine, const Team& team) {
    seen_[team.rank] = mine;
    team.wait();
    const bool result = std::all_of(seen_.begin(), seen_.begin() + team.size, [](char x) { return x != 0; });
    team.wait();  // before that is written again
    return result;
  }

 private:
  std::vector<char> seen_;
};

// Solves with what is added to the diagonal, and with more where that fails. `solve(shift)`, of all threads, writes the
// result and returns 0, or kNotFinite or kNoInverse.
template <typename Real, typename Solve>
FC_INLINE void attempt(const Factor& f, const Team& team, const Solve& solve) {
  const Real* const in = static_cast<const Real*>(f.in);
  double mean = 0.0, jitter = 0.0;
  for (long long i = 0; i < f.n; ++i) mean += static_cast<double>(in[i * f.n + i]) / static_cast<double>(f.n);
  int found = kNoInverse;
  for (int tries = 0; tries <= kJitters && found == kNoInverse; ++tries) {
    found = solve(static_cast<Real>(*f.damping + jitter));
    if (found == 0) {
      if (team.rank == 0) *f.info = tries;
      return;
    }
    jitter = jitter == 0.0 ? kJitter * mean : 10.0 * jitter;
  }
  if (team.rank == 0) {
    Real* const out = static_cast<Real*>(f.out);
    if (f.previous) {
      std::copy_n(static_cast<const Real*>(f.previous), f.n * f.n, out);
    } else {
      std::fill_n(out, f.n * f.n, Real());
    }
    *f.info = found;
  }
  team.wait();
}

// The whole list. `make_room(n, threads)` makes what threads need that do matrices of up to n rows together;
// `function(factor, room, team)` does one.
template <typename Room, typename Function>
void on_factors(const std::vector<Factor>& factors, const Function& function) {
  std::vector<double> costs;
  for (const Factor& f : factors) costs.push_back(*f.info == 0 ? 0.0 : static_cast<double>(f.n) * f.n * f.n);
  on_teams(
      costs,
      [&](const std::vector<size_t>& numbers, int threads) {
        long long n = 0;
        for (size_t number : numbers) n = std::max(n, factors[number].n);
        return Room(n, threads);
      },
      [&](size_t number, Room& room, const Team& team) {
        if (*factors[number].info != 0) function(&factors[number], &room, &team);
      });
}

}  // namespace fastcurv
