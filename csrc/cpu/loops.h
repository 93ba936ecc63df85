// The loops of every multi-tensor op on the CPU: its rule (../rule.h) over a table, in one parallel region.
// Floor: bytes over memory bandwidth, plus about 0.1 us per tensor.
#pragma once
#include <vector>

#include "../rule.h"
#include "parallel.h"
#include "simd.h"

namespace fastcurv {

// Rows up to this length are short: the last elements of each, which fill no vector, would cost as much as the others.
constexpr long long kShortRow = 512;
// Elements of short rows that are updated in one loop, and how many are written at a time when values are repeated.
constexpr long long kShortChunk = 2048;
constexpr int kRepeat = 16;
// Distance of the repeated values of a row's members: the last vector of one must not reach the next.
constexpr long long kPlane = kShortChunk + kRepeat;

template <typename Rule>
constexpr int kRowValues = sizeof(typename Rule::Row) / sizeof(typename Rule::T);

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

// Updates `count` elements of one row, or of a tensor without rows (`with_first`: first() has not been there).
template <typename Rule, bool with_first, bool rare, int... l, typename... Lists>
FC_INLINE void update_elements(const typename Rule::Coefficients& coefficients, const typename Rule::Row& its_row,
                               long long count, Indices<l...>, Lists* __restrict... lists) {
  using T = typename Rule::T;
  // Copies, which no list can overlap.
  const typename Rule::Coefficients c = coefficients;
  const typename Rule::Row row = its_row;
  constexpr unsigned int more = rare ? Rule::kRare : 0;
  constexpr unsigned int reads = Rule::kReads | more | (with_first ? Rule::kFirstReads : 0);
  constexpr unsigned int writes = Rule::kWrites | more | (with_first ? Rule::kFirstWrites : 0);
#pragma GCC ivdep
  for (long long i = 0; i < count; ++i) {
    T x[] = {value_at<has(reads, l), T>(lists, i)...};
    if (with_first && Rule::kSums) {
      double terms[Rule::kSums + 1];
      Rule::first(c, x, terms);
    }
    Rule::element(c, row, x);
    if (rare) Rule::rare(c, x);
    (set_value<has(writes, l)>(lists, i, x[l]), ...);
  }
}

template <typename Rule, bool with_first, int... l>
FC_INLINE void update_run(const typename Rule::Coefficients& c, const typename Rule::Row& row, const Table& table,
                          long long tensor, long long position, long long count, Indices<l...> all) {
  if (Rule::kRare && Rule::is_rare(c)) {
    update_elements<Rule, with_first, true>(c, row, count, all, list_at<Rule, l>(table, tensor, position)...);
  } else {
    update_elements<Rule, with_first, false>(c, row, count, all, list_at<Rule, l>(table, tensor, position)...);
  }
}

// Adds lane j + w to lane j for w = half, quarter, ...: lane 0 is then the sum.
template <int w = kLanes / 2>
FC_INLINE void add_lanes(double* lanes) {
  for (int j = 0; j < w; ++j) lanes[j] += lanes[j + w];
  if constexpr (w > 1) add_lanes<w / 2>(lanes);
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
    add_lanes(lanes[k]);
    sums[k] = lanes[k][0];
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
    add_lanes(lanes[k]);
    sums[k] = lanes[k][0];
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
    add_lanes(lanes);
    sums[k] = lanes[0];
  }
}

// What a clone for each SIMD level is made of. Positions are elements, rows or segments of the tensor.
template <typename Rule>
struct UpdateElements {
  static FC_INLINE void run(const typename Rule::Coefficients* c, const Table* table, long long tensor, long long begin,
                            long long end) {
    using All = typename MakeIndices<Rule::kLists>::type;
    if constexpr (Rule::kSums > 0) {
      const Rows rows = table->rows(tensor);
      if (rows.count) {  // their sums were taken before
        while (begin < end) {
          const long long stop = std::min(end, (begin / rows.inner + 1) * rows.inner);
          const auto row = *reinterpret_cast<const typename Rule::Row*>(table->row_scratch(rows, rows.row_at(begin)));
          update_run<Rule, false>(*c, row, *table, tensor, begin, stop - begin, All());
          begin = stop;
        }
        return;
      }
    }
    update_run<Rule, true>(*c, Rule::no_row(*c), *table, tensor, begin, end - begin, All());
  }
};

// Rows of one element.
template <typename Rule, bool rare, int... l, typename... Lists>
FC_INLINE void update_single(const typename Rule::Coefficients& coefficients, const Table& table, long long tensor,
                             long long begin, long long count, Indices<l...>, Lists* __restrict... lists) {
  using T = typename Rule::T;
  const typename Rule::Coefficients c = coefficients;
  constexpr unsigned int more = rare ? Rule::kRare : 0;
#pragma GCC ivdep
  for (long long i = 0; i < count; ++i) {
    T x[] = {value_at<has(Rule::kReads | Rule::kFirstReads | more, l), T>(lists, i)...};
    double terms[Rule::kSums];
    Rule::first(c, x, terms);
    for (int k = 0; k < Rule::kSums; ++k) terms[k] += 0.0;  // a sum begins with 0: -0 does not come out of it
    Rule::element(c, Rule::row(c, terms, 1, table, tensor, begin + i), x);
    if (rare) Rule::rare(c, x);
    (set_value<has(Rule::kWrites | Rule::kFirstWrites | more, l)>(lists, i, x[l]), ...);
  }
}

// Short rows, all of a chunk in one loop: what is known of a row is repeated for each of its elements.
template <typename Rule, bool rare, int... l, typename... Lists>
FC_INLINE void update_short(const typename Rule::Coefficients& coefficients, const typename Rule::T* repeated,
                            long long count, Indices<l...>, Lists* __restrict... lists) {
  using T = typename Rule::T;
  const typename Rule::Coefficients c = coefficients;
  constexpr unsigned int more = rare ? Rule::kRare : 0;
#pragma GCC ivdep
  for (long long i = 0; i < count; ++i) {
    T x[] = {value_at<has(Rule::kReads | more, l), T>(lists, i)...};
    typename Rule::Row row;
    T* values = reinterpret_cast<T*>(&row);
    for (int k = 0; k < kRowValues<Rule>; ++k) values[k] = repeated[k * kPlane + i];
    Rule::element(c, row, x);
    if (rare) Rule::rare(c, x);
    (set_value<has(Rule::kWrites | more, l)>(lists, i, x[l]), ...);
  }
}

template <typename Rule>
struct UpdateRows {
  using Coefficients = typename Rule::Coefficients;
  using T = typename Rule::T;
  using All = typename MakeIndices<Rule::kLists>::type;

  static FC_INLINE void run(const Coefficients* c, const Table* table, long long tensor, long long begin,
                            long long end) {
    const Rows rows = table->rows(tensor);
    const bool rare = Rule::kRare && Rule::is_rare(*c);
    if (rows.length == 1) {
      rare ? single<true>(*c, *table, tensor, begin, end - begin, All())
           : single<false>(*c, *table, tensor, begin, end - begin, All());
    } else if (rows.length <= kShortRow) {
      const long long fit = kShortChunk / rows.length;
      for (; begin < end; begin += fit) short_rows(*c, *table, tensor, rows, begin, std::min(end, begin + fit), rare);
    } else {
      for (; begin < end; ++begin) {
        const typename Rule::Row row = its_row(*c, *table, tensor, rows, begin);
        update_run<Rule, false>(*c, row, *table, tensor, begin * rows.length, rows.length, All());
      }
    }
  }

 private:
  static FC_INLINE typename Rule::Row its_row(const Coefficients& c, const Table& table, long long tensor,
                                              const Rows& rows, long long row) {
    double segments[kLocalRow / kSegment][Rule::kSums], sums[Rule::kSums];
    for (long long s = 0; s < rows.segments(); ++s) {
      sum_segment<Rule>(c, table, tensor, rows, row, s, segments[s], All());
    }
    sum_row<Rule>(segments[0], rows.segments(), Rule::kSums, sums);
    return Rule::row(c, sums, rows.length, table, tensor, row);
  }

  static FC_INLINE void short_rows(const Coefficients& c, const Table& table, long long tensor, const Rows& rows,
                                   long long begin, long long end, bool rare) {
    typename Rule::Row found[kShortChunk / 2];
    for (long long r = begin; r < end; ++r) {
      double sums[Rule::kSums];
      sum_segment<Rule>(c, table, tensor, rows, r, 0, sums, All());
      found[r - begin] = Rule::row(c, sums, rows.length, table, tensor, r);
    }
    // A row's values are written in whole vectors, over the place of the next row's, which come after.
    T repeated[kRowValues<Rule> * kPlane];
    for (int k = 0; k < kRowValues<Rule>; ++k) {
      for (long long r = 0; r < end - begin; ++r) {
        const T value = reinterpret_cast<const T*>(&found[r])[k];
        T* out = repeated + k * kPlane + r * rows.length;
        for (long long i = 0; i < rows.length; i += kRepeat) {
          for (int j = 0; j < kRepeat; ++j) out[i + j] = value;
        }
      }
    }
    rare ? repeated_rows<true>(c, table, tensor, repeated, begin * rows.length, (end - begin) * rows.length, All())
         : repeated_rows<false>(c, table, tensor, repeated, begin * rows.length, (end - begin) * rows.length, All());
  }

  template <bool rare, int... l>
  static FC_INLINE void single(const Coefficients& c, const Table& table, long long tensor, long long begin,
                               long long count, Indices<l...> all) {
    update_single<Rule, rare>(c, table, tensor, begin, count, all, list_at<Rule, l>(table, tensor, begin)...);
  }
  template <bool rare, int... l>
  static FC_INLINE void repeated_rows(const Coefficients& c, const Table& table, long long tensor, const T* repeated,
                                      long long begin, long long count, Indices<l...> all) {
    update_short<Rule, rare>(c, repeated, count, all, list_at<Rule, l>(table, tensor, begin)...);
  }
};

template <typename Rule>
struct SumSegments {
  static FC_INLINE void run(const typename Rule::Coefficients* c, const Table* table, long long tensor, long long begin,
                            long long end) {
    const Rows rows = table->rows(tensor);
    for (long long s = begin; s < end; ++s) {
      const long long row = s / rows.segments(), segment = s % rows.segments();
      sum_segment<Rule>(*c, *table, tensor, rows, row, segment, table->segment_scratch(rows, row, segment),
                        typename MakeIndices<Rule::kLists>::type());
    }
  }
};

template <typename Rule>
struct FinishRows {
  static FC_INLINE void run(const typename Rule::Coefficients* c, const Table* table, long long tensor, long long begin,
                            long long end) {
    const Rows rows = table->rows(tensor);
    double sums[Rule::kSums];
    for (long long r = begin; r < end; ++r) {
      sum_row<Rule>(table->segment_scratch(rows, r, 0), rows.segments(), kRowWords, sums);
      static_assert(sizeof(typename Rule::Row) <= kRowWords * sizeof(double));
      *reinterpret_cast<typename Rule::Row*>(table->row_scratch(rows, r)) =
          Rule::row(*c, sums, rows.length, *table, tensor, r);
    }
  }
};

// The whole op on host memory.
template <typename Rule>
void run_rule(const Args& args) {
  using Coefficients = typename Rule::Coefficients;
  if (args.skips()) return;
  const Table table = args.table();

  // Tensors mostly share their step count: one computation per run of equals. Steps are advanced now, while they are in
  // the cache.
  std::vector<Coefficients> coefficients;
  std::vector<int32_t> which(table.tensors());
  for (long long t = 0; t < table.tensors(); ++t) {
    if (t == 0 || !Rule::alike(table, t - 1, t)) coefficients.push_back(Rule::coefficients(args, table, t));
    which[t] = static_cast<int32_t>(coefficients.size() - 1);
  }
  for (long long t = 0; t < table.tensors(); ++t) Rule::advance(args, table, t);

  const auto on = [&](auto loop) {
    using Loop = decltype(loop);
    const auto function =
        Clones<Loop>::template select<const Coefficients*, const Table*, long long, long long, long long>();
    return [&, function](long long t, long long begin, long long end) {
      function(&coefficients[which[t]], &table, t, begin, end);
    };
  };
  const auto update_elements = on(UpdateElements<Rule>());
  const auto elements = running_totals(table, [&](long long t) { return table.numel(t); });
  const bool parallel = elements.back() > kSerialElements;
  if constexpr (Rule::kSums == 0) {
#pragma omp parallel if (parallel)
    for_my_share(elements, kRangeAlignment, update_elements);
  } else {
    const auto update_rows = on(UpdateRows<Rule>());
    const auto sum_segments = on(SumSegments<Rule>());
    const auto finish_rows = on(FinishRows<Rule>());
    const auto with_scratch = [&](auto size) {
      return running_totals(table, [&, size](long long t) { return table.rows(t).scratch ? size(table.rows(t)) : 0; });
    };
    const auto rows = with_scratch([](const Rows& r) { return r.count; });
    const auto segments = with_scratch([](const Rows& r) { return r.count * r.segments(); });
#pragma omp parallel if (parallel)
    {
      if (rows.back()) {
        for_my_share(segments, 1, sum_segments);
#pragma omp barrier
        for_my_share(rows, 1, finish_rows);
#pragma omp barrier
      }
      for_my_share(elements, kRangeAlignment, [&](long long t, long long begin, long long end) {
        const Rows r = table.rows(t);
        // Whole rows: those that begin in this thread's share.
        if (!r.local()) return update_elements(t, begin, end);
        update_rows(t, (begin + r.inner - 1) / r.inner, (end + r.inner - 1) / r.inner);
      });
    }
  }
}

// The same for the dtypes of a call.
template <template <typename, typename, int> class Rule, int variant>
void run_rule(const Args& args, Dtype param, Dtype state) {
  switch (param) {
    case Dtype::float64: return run_rule<Rule<double, double, variant>>(args);
    case Dtype::bfloat16: return run_rule<Rule<bfloat16, float, variant>>(args);
    case Dtype::float16: return run_rule<Rule<float16, float, variant>>(args);
    case Dtype::float32: break;
  }
  return state == Dtype::bfloat16 ? run_rule<Rule<float, bfloat16, variant>>(args)
                                  : run_rule<Rule<float, float, variant>>(args);
}

}  // namespace fastcurv
