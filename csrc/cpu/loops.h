// The loops of every multi-tensor op on the CPU: its rule (../rule.h) over a table, in one parallel region.
// Floor: bytes over memory bandwidth, plus about 0.1 us per tensor.
#pragma once
#include <vector>

#include "../rule.h"
#include "parallel.h"
#include "simd.h"

namespace fastcurv {

// The lists of a tensor from one position on. Lists that no step of the rule takes may be absent.
template <typename Rule, int l>
FC_INLINE Stored<Rule, l>* list_at(const Table& table, long long tensor, long long position) {
  constexpr bool used = has(Rule::kReads | Rule::kFirstReads | Rule::kRare, l);
  return used ? table.pointer<Stored<Rule, l>>(tensor, l) + position : nullptr;
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
FC_INLINE void update_elements(const typename Rule::Coefficients& c, const typename Rule::Row& row, long long count,
                               Indices<l...>, Lists* __restrict... lists) {
  using T = typename Rule::T;
  constexpr unsigned int more = rare ? Rule::kRare : 0;
  constexpr unsigned int reads = Rule::kReads | more | (with_first ? Rule::kFirstReads : 0);
  constexpr unsigned int writes = Rule::kWrites | more | (with_first ? Rule::kFirstWrites : 0);
#pragma omp simd
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
FC_INLINE void add_lanes(double* lanes) {
  for (int w = kLanes / 2; w > 0; w /= 2) {
    for (int j = 0; j < w; ++j) lanes[j] += lanes[j + w];
  }
}

// The sums over a segment of a row, whose elements follow each other from `position` on if it is contiguous.
template <typename Rule, bool contiguous, int... l, typename... Lists>
FC_INLINE void add_segment(const typename Rule::Coefficients& c, const Rows& rows, long long row, long long begin,
                           long long count, double* sums, Indices<l...>, Lists* __restrict... lists) {
  using T = typename Rule::T;
  double lanes[Rule::kSums][kLanes] = {};
  for (long long i = 0; i < count; i += kLanes) {
    const int width = static_cast<int>(count - i < kLanes ? count - i : kLanes);
    if (contiguous && width == kLanes) {
#pragma omp simd
      for (int j = 0; j < kLanes; ++j) {
        double terms[Rule::kSums];
        T x[] = {value_at<has(Rule::kFirstReads, l), T>(lists, i + j)...};
        Rule::first(c, x, terms);
        for (int k = 0; k < Rule::kSums; ++k) lanes[k][j] += terms[k];
        (set_value<has(Rule::kFirstWrites, l)>(lists, i + j, x[l]), ...);
      }
    } else {
      for (int j = 0; j < width; ++j) {
        const long long at = contiguous ? i + j : rows.position(row, begin + i + j);
        double terms[Rule::kSums];
        T x[] = {value_at<has(Rule::kFirstReads, l), T>(lists, at)...};
        Rule::first(c, x, terms);
        for (int k = 0; k < Rule::kSums; ++k) lanes[k][j] += terms[k];
        (set_value<has(Rule::kFirstWrites, l)>(lists, at, x[l]), ...);
      }
    }
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
    add_segment<Rule, true>(c, rows, row, begin, count, sums, all, list_at<Rule, l>(table, tensor, at)...);
  } else {
    add_segment<Rule, false>(c, rows, row, begin, count, sums, all, list_at<Rule, l>(table, tensor, 0)...);
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

template <typename Rule>
struct UpdateRows {
  static FC_INLINE void run(const typename Rule::Coefficients* c, const Table* table, long long tensor, long long begin,
                            long long end) {
    using All = typename MakeIndices<Rule::kLists>::type;
    const Rows rows = table->rows(tensor);
    double segments[kLocalRow / kSegment][Rule::kSums], sums[Rule::kSums];
    for (long long r = begin; r < end; ++r) {
      for (long long s = 0; s < rows.segments(); ++s) {
        sum_segment<Rule>(*c, *table, tensor, rows, r, s, segments[s], All());
      }
      sum_row<Rule>(segments[0], rows.segments(), Rule::kSums, sums);
      const typename Rule::Row row = Rule::row(*c, sums, rows.length, *table, tensor, r);
      update_run<Rule, false>(*c, row, *table, tensor, r * rows.length, rows.length, All());
    }
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
