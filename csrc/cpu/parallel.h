// One parallel region over all elements of all tensors of a table, split by elements, never by tensors.
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

// Calls range(tensor, begin, end) for disjoint element ranges that cover the table. Each thread takes one contiguous
// stretch, the same in every call of equal shape, so that a thread meets the pages and cache lines it met last time.
template <typename Range>
void for_each_element_range(const Table& table, const Range& range) {
  const long long tensors = table.tensors();
  std::vector<long long> offsets(tensors + 1, 0);
  for (long long t = 0; t < tensors; ++t) offsets[t + 1] = offsets[t] + table.numel(t);
  const long long total = offsets[tensors];

#pragma omp parallel if (total > kSerialElements)
  {
    const long long share = (total + omp_get_num_threads() - 1) / omp_get_num_threads();
    const long long aligned = (share + kRangeAlignment - 1) / kRangeAlignment * kRangeAlignment;
    const long long begin = std::min(total, omp_get_thread_num() * aligned);
    const long long end = std::min(total, begin + aligned);
    long long t = std::upper_bound(offsets.begin(), offsets.end(), begin) - offsets.begin() - 1;
    for (; t < tensors && offsets[t] < end; ++t) {
      const long long from = std::max(begin, offsets[t]);
      const long long to = std::min(end, offsets[t + 1]);
      if (from < to) range(t, from - offsets[t], to - offsets[t]);
    }
  }
}

}  // namespace fastcurv
