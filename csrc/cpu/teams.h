// Lists of matrices of any sizes on all threads: those that would keep one thread busy after the others are done are
// shared by all threads, one after another, and the others have a thread each. What is computed must not depend on it.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <vector>

#include "../numeric.h"
#include "each_matrix.h"

namespace fastcurv {

// The threads that share a matrix; they meet in wait().
struct Team {
  int rank, size;

  FC_INLINE void wait() const {
    if (size > 1) {
#pragma omp barrier
    }
  }
};

// Memory that vectors are aligned in.
template <typename Real>
class Buffer {
 public:
  explicit Buffer(long long elements) : memory_(new Real[elements + kAlignment]) {}
  Real* begin() const {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    return memory_.get() + (64 - address % 64) % 64 / sizeof(Real);
  }

 private:
  static constexpr long long kAlignment = 64 / sizeof(Real);
  std::unique_ptr<Real[]> memory_;
};

// Rows of a padded copy of a matrix, and how far they are apart: a power of two would bring them into few sets of a
// cache.
template <typename Real>
constexpr long long padded_rows(long long n) {
  return padded(n, 64 / sizeof(Real));
}
template <typename Real>
constexpr long long padded_stride(long long n) {
  const long long step = 64 / sizeof(Real);
  return padded_rows<Real>(n) + (padded_rows<Real>(n) % (8 * step) == 0 ? step : 0);
}

// `costs`: flops of each matrix. `make_room(numbers, threads)` makes what the threads share that do one of them at a
// time; `run(number, room, team)` does it.
template <typename MakeRoom, typename Run>
void on_teams(const std::vector<double>& costs, const MakeRoom& make_room, const Run& run) {
  std::vector<size_t> order(costs.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return costs[a] > costs[b]; });
  double rest = std::accumulate(costs.begin(), costs.end(), 0.0);
  const int threads = rest > kSerialFlops ? omp_get_max_threads() : 1;
  size_t shared = 0;
  while (threads > 1 && shared < order.size() && threads * costs[order[shared]] > rest) rest -= costs[order[shared++]];
  std::vector<decltype(make_room(order, threads))> rooms;
  const std::vector<size_t> first(order.begin(), order.begin() + shared), others(order.begin() + shared, order.end());
  for (int t = 0; t < threads; ++t) rooms.push_back(make_room(t == 0 && shared ? order : others, threads));
#pragma omp parallel num_threads(threads)
  {
    const Team all = {omp_get_thread_num(), omp_get_num_threads()}, alone = {0, 1};
    for (size_t number : first) run(number, rooms[0], all);
#pragma omp for schedule(dynamic, 1)
    for (size_t k = 0; k < others.size(); ++k) run(others[k], rooms[all.rank], alone);
  }
}

}  // namespace fastcurv
