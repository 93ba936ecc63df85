// The lists of a table as the loops of the CPU see them, and sums over segments and rows in the order of ../table.h.
#pragma once
#include <algorithm>

#include "../rule.h"

namespace fastcurv {

// The lists of a tensor from one position on. Lists that no step of the rule takes may be absent.
template <typename Rule, int l>
FC_INLINE Stored<Rule, l>* list_at(const Table& table, long long tensor, long long position) {
  constexpr bool used = has(Rule::kReads | Rule::kFirstReads | Rule::kRare, l);
  return used ? table.pointer<Stored<Rule, l>>(tensor, l) + position : nullptr;
}

template <bool taken, typename Storage>
FC_INLINE Storage* advanced(Storage* list, long long elements) {
  return taken ? list + elements : nullptr;
}

template <bool taken, typename T, typename Storage>
FC_INLINE T value_at(const Storage* list, long long i) {
  if constexpr (taken) {
    return load(list[i]);
  } else {
    return T(0);
  }
}

template <bool changed, typename T, typename Storage>
FC_INLINE void set_value(Storage* list, long long i, T value) {
  if constexpr (changed) store(list[i], value);
}

// The lanes added in halves: lane j and lane j + w for w = 16, 8, 4, 2, 1. In vectors, for of loops over 4, 2 and 1
// elements a compiler makes scalar code that takes longer than the rest of the sums of a short row.
FC_INLINE double add_lanes(const double* lanes) {
  using Eight = double __attribute__((vector_size(64)));
  using Four = double __attribute__((vector_size(32)));
  using Two = double __attribute__((vector_size(16)));
  static_assert(kLanes == 32);
  Eight quarters[4];
  __builtin_memcpy(quarters, lanes, sizeof quarters);
  const Eight eight = (quarters[0] + quarters[2]) + (quarters[1] + quarters[3]);
  Four fours[2];
  __builtin_memcpy(fours, &eight, sizeof fours);
  const Four four = fours[0] + fours[1];
  Two twos[2];
  __builtin_memcpy(twos, &four, sizeof twos);
  const Two two = twos[0] + twos[1];
  return two[0] + two[1];
}

// Adds the terms of kLanes elements to the lanes, or at the end of a row those of the first `width` of them. The first
// time lanes are written and not read.
template <typename Rule, bool contiguous, bool first_time, int... l, typename... Lists>
FC_INLINE void add_terms(const typename Rule::Coefficients& c, const Rows& rows, long long row, long long begin,
                         int trips, int width, double (*lanes)[kLanes], Indices<l...>, Lists* __restrict... lists) {
  using T = typename Rule::T;
#pragma GCC ivdep
  for (int j = 0; j < trips; ++j) {
    const long long at = contiguous ? j : rows.position(row, begin + j);
    double terms[Rule::kSums];
    T x[] = {value_at<has(Rule::kFirstReads, l), T>(lists, at)...};
    Rule::first(c, x, terms);
    for (int k = 0; k < Rule::kSums; ++k) {
      lanes[k][j] = (first_time ? 0.0 : lanes[k][j]) + (j < width ? terms[k] : 0.0);
    }
    (set_value<has(Rule::kFirstWrites, l)>(lists, at, x[l]), ...);
  }
}

template <typename Rule, bool first_time, int... l, typename... Lists>
FC_INLINE void add_last_terms(const typename Rule::Coefficients& c, const Rows& rows, int width, long long readable,
                              double (*lanes)[kLanes], Indices<l...> all, Lists* __restrict... lists) {
  if (Rule::kFirstWrites == 0 && width + readable >= kLanes) {
    add_terms<Rule, true, first_time>(c, rows, 0, 0, kLanes, width, lanes, all, lists...);
    return;
  }
  add_terms<Rule, true, first_time>(c, rows, 0, 0, width, width, lanes, all, lists...);
  for (int k = 0; first_time && k < Rule::kSums; ++k) {
    for (int j = width; j < kLanes; ++j) lanes[k][j] = 0.0;
  }
}

// The sums over `count` elements that follow each other where the lists begin; `readable` more may be looked at.
template <typename Rule, int... l, typename... Lists>
FC_INLINE void sum_elements(const typename Rule::Coefficients& coefficients, const Rows& rows, long long count,
                            long long readable, double* sums, Indices<l...> all, Lists* __restrict... lists) {
  const typename Rule::Coefficients c = coefficients;
  double lanes[Rule::kSums][kLanes];
  if (count < kLanes) {
    add_last_terms<Rule, true>(c, rows, static_cast<int>(count), readable, lanes, all, lists...);
  } else {
    add_terms<Rule, true, true>(c, rows, 0, 0, kLanes, kLanes, lanes, all, lists...);
    long long i = kLanes;
    for (; i + kLanes <= count; i += kLanes) {
      add_terms<Rule, true, false>(c, rows, 0, 0, kLanes, kLanes, lanes, all,
                                   advanced<has(Rule::kFirstReads, l)>(lists, i)...);
    }
    if (i < count) {
      add_last_terms<Rule, false>(c, rows, static_cast<int>(count - i), readable, lanes, all,
                                  advanced<has(Rule::kFirstReads, l)>(lists, i)...);
    }
  }
  for (int k = 0; k < Rule::kSums; ++k) {
    sums[k] = add_lanes(lanes[k]);
  }
}

// The same for elements begin, begin + 1, ... of a row that is not contiguous; the lists begin where the tensor does.
template <typename Rule, int... l, typename... Lists>
FC_INLINE void sum_scattered(const typename Rule::Coefficients& c, const Rows& rows, long long row, long long begin,
                             long long count, double* sums, Indices<l...> all, Lists* __restrict... lists) {
  double lanes[Rule::kSums][kLanes] = {};
  for (long long i = 0; i < count; i += kLanes) {
    const int width = static_cast<int>(std::min<long long>(count - i, kLanes));
    add_terms<Rule, false, false>(c, rows, row, begin + i, width, width, lanes, all, lists...);
  }
  for (int k = 0; k < Rule::kSums; ++k) {
    sums[k] = add_lanes(lanes[k]);
  }
}

template <typename Rule, int... l>
FC_INLINE void sum_segment(const typename Rule::Coefficients& c, const Table& table, long long tensor, const Rows& rows,
                           long long row, long long segment, double* sums, Indices<l...> all) {
  const long long begin = segment * kSegment;
  const long long count = std::min(kSegment, rows.length - begin);
  if (rows.inner == rows.length) {
    const long long at = row * rows.length + begin;
    const long long readable = table.numel(tensor) - at - count;
    sum_elements<Rule>(c, rows, count, readable, sums, all, list_at<Rule, l>(table, tensor, at)...);
  } else {
    sum_scattered<Rule>(c, rows, row, begin, count, sums, all, list_at<Rule, l>(table, tensor, 0)...);
  }
}

// The sums over a row from those over its segments, `stride` doubles apart.
template <typename Rule>
FC_INLINE void sum_row(const double* segments, long long count, int stride, double* sums) {
  for (int k = 0; k < Rule::kSums; ++k) {
    if (count == 1) {  // what follows gives the same
      sums[k] = segments[k];
      continue;
    }
    double lanes[kLanes] = {};
    for (long long s = 0; s < count; ++s) lanes[s % kLanes] += segments[s * stride + k];
    sums[k] = add_lanes(lanes);
  }
}

}  // namespace fastcurv
