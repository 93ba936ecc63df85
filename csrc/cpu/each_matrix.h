// Goes over a list of matrices, one thread to a matrix, the dearest first.
#pragma once
#include <omp.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "../matrices.h"

namespace fastcurv {

// The multiple of a number that is not below n.
constexpr long long padded(long long n, long long to) { return (n + to - 1) / to * to; }

// Flops that are worth waking another thread.
constexpr long long kSerialFlops = 1 << 18;

// `flops(matrix)` says what one costs, `make_room()` allocates what a thread needs, `run(matrix, room)` does it.
template <typename Flops, typename MakeRoom, typename Run>
void for_each_matrix(const std::vector<Matrix>& matrices, const Flops& flops, const MakeRoom& make_room,
                     const Run& run) {
  std::vector<long long> costs;
  for (const Matrix& matrix : matrices) costs.push_back(flops(matrix));
  std::vector<size_t> order(matrices.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return costs[a] > costs[b]; });
  const long long all = std::accumulate(costs.begin(), costs.end(), 0ll);
#pragma omp parallel if (matrices.size() > 1 && all > kSerialFlops)
  {
    auto room = make_room();
#pragma omp for schedule(dynamic, 1)
    for (size_t k = 0; k < order.size(); ++k) run(matrices[order[k]], room);
  }
}

}  // namespace fastcurv
