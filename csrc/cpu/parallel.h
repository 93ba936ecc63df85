// Dividing the work on a table among threads: by elements over all tensors, never by tensors.
#pragma once
#include <omp.h>

#include <algorithm>
#include <vector>

#include "../table.h"

namespace fastcurv {

// Below this many elements a second thread costs more to wake than it saves (measured: about 5 us against 0.3 ns each).
constexpr long long kSerialElements = 1 << 15;
// Ranges start at multiples of this, so that no two threads write one cache line of a 64-byte aligned tensor.
constexpr long long kRangeAlignment = 64;

// Running totals of a size of each tensor, beginning with 0.
template <typename Size>
std::vector<long long> running_totals(const Table& table, const Size& size) {
  std::vector<long long> totals(table.tensors() + 1, 0);
  for (long long t = 0; t < table.tensors(); ++t) totals[t + 1] = totals[t] + size(t);
  return totals;
}

// Inside a parallel region: calls range(tensor, begin, end) for this thread's share of the tensors from one number up
// to another. That is one contiguous stretch, the same in every call of equal sizes, so that a thread meets the pages
// and cache lines it met last time.
template <typename Range>
void for_my_share(const std::vector<long long>& totals, long long first, long long last, long long alignment,
                  const Range& range) {
  const long long total = totals[last] - totals[first];
  const long long share = (total + omp_get_num_threads() - 1) / omp_get_num_threads();
  const long long aligned = (share + alignment - 1) / alignment * alignment;
  const long long begin = totals[first] + std::min(total, omp_get_thread_num() * aligned);
  const long long end = std::min(totals[last], begin + aligned);
  long long t = std::upper_bound(totals.begin() + first, totals.begin() + last + 1, begin) - totals.begin() - 1;
  for (; t < last && totals[t] < end; ++t) {
    const long long from = std::max(begin, totals[t]);
    const long long to = std::min(end, totals[t + 1]);
    if (from < to) range(t, from - totals[t], to - totals[t]);
  }
}

}  // namespace fastcurv
