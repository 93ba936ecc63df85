// What the ops on damped factors share: who is done again with jitter, and what is written for those that fail.
#pragma once
#include <algorithm>
#include <iterator>
#include <utility>
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
    if (tries > 0) found = kNoInverse;  // what jitter made infinite was finite before
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

// The whole list. `Room(n, threads)` is what threads need that do matrices of up to n rows together;
// `function(factors, count, room, team)` does up to `most_count` of one size of at most `most_rows`, and others alone.
template <typename Room, typename Function>
void on_factors(const std::vector<Factor>& factors, const Function& function, long long most_rows = 0,
                int most_count = 1) {
  std::vector<Factor> todo;
  todo.reserve(factors.size());
  std::copy_if(factors.begin(), factors.end(), std::back_inserter(todo), [](const Factor& f) { return *f.info != 0; });
  std::stable_sort(todo.begin(), todo.end(), [](const Factor& f, const Factor& g) { return f.n < g.n; });
  std::vector<std::pair<const Factor*, int>> groups;
  std::vector<double> costs;
  for (const Factor& f : todo) {
    const bool is_small = f.n <= most_rows;
    if (is_small && !groups.empty() && f.n == groups.back().first->n && groups.back().second < most_count) {
      ++groups.back().second;
      continue;
    }
    groups.emplace_back(&f, 1);
    costs.push_back(static_cast<double>(f.n) * f.n * f.n * (is_small ? 2 : 1));  // for a few, what two cost alone
  }
  on_teams(
      costs,
      [&](const std::vector<size_t>& numbers, int threads) {
        long long n = 0;
        for (size_t number : numbers) n = std::max(n, groups[number].first->n);
        return Room(n, threads);
      },
      [&](size_t number, Room& room, const Team& team) {
        function(groups[number].first, groups[number].second, &room, &team);
      });
}

}  // namespace fastcurv
