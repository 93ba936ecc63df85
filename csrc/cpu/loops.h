// The loops of every multi-tensor op on the CPU: its rule (../rule.h) over a table, in one parallel region.
// Floor: bytes over memory bandwidth, plus about 0.1 us per tensor.
#pragma once
#include <type_traits>
#include <vector>

#include "parallel.h"
#include "simd.h"
#include "sums.h"

namespace fastcurv {

// Rows up to this length are short: updated one by one, their last elements, which fill no vector, and the start of
// their sums would cost as much as the rest (measured at 64, 100, 128 and 256 elements).
constexpr long long kShortRow = 127;
// Elements of short rows that are updated in one loop, and how many are written at a time when values are repeated.
constexpr long long kShortChunk = 2048;
constexpr int kRepeat = 16;
// Distance of the repeated values of a row's members: the last vector of one must not reach the next.
constexpr long long kPlane = kShortChunk + kRepeat;
// Elements of the tensors whose sums are all taken before any of them is updated, so that the update finds them in the
// last cache: some ten megabytes. (Measured with 32: half and twice as many do as well, four times as many worse.)
constexpr long long kBatch = 1 << 19;

template <typename Rule>
constexpr int kRowValues = sizeof(typename Rule::Row) / sizeof(typename Rule::RowValue);

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

// What a clone for each SIMD level is made of. Positions are elements, rows or segments of the tensor.
template <typename Rule>
struct UpdateElements {
  static FC_INLINE void run(const typename Rule::Coefficients* c, const Table* table, long long tensor, long long begin,
                            long long end) {
    using All = typename MakeIndices<Rule::kLists>::type;
    const Rows rows = Rule::kSums > 0 ? table->rows(tensor) : Rows();
    if ((Rule::kSums == 0 || Rule::kFirstWrites != 0) && !rows.count) {
      update_run<Rule, true>(*c, Rule::no_row(*c), *table, tensor, begin, end - begin, All());
      return;
    }
    while (Rule::kSums > 0 && begin < end) {  // one pass without rows, else row by row: their sums are known
      long long stop = end;
      typename Rule::Row row = Rule::no_row(*c);
      if (rows.count) {
        stop = std::min(end, (begin / rows.inner + 1) * rows.inner);
        row = *reinterpret_cast<const typename Rule::Row*>(table->row_scratch(rows, rows.row_at(begin)));
      }
      update_run<Rule, false>(*c, row, *table, tensor, begin, stop - begin, All());
      begin = stop;
    }
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
FC_INLINE void update_short(const typename Rule::Coefficients& coefficients, const typename Rule::RowValue* repeated,
                            long long count, Indices<l...>, Lists* __restrict... lists) {
  using T = typename Rule::T;
  const typename Rule::Coefficients c = coefficients;
  constexpr unsigned int more = rare ? Rule::kRare : 0;
#pragma GCC ivdep
  for (long long i = 0; i < count; ++i) {
    T x[] = {value_at<has(Rule::kReads | more, l), T>(lists, i)...};
    typename Rule::Row row;
    auto* values = reinterpret_cast<typename Rule::RowValue*>(&row);
    for (int k = 0; k < kRowValues<Rule>; ++k) values[k] = repeated[k * kPlane + i];
    Rule::element(c, row, x);
    if (rare) Rule::rare(c, x);
    (set_value<has(Rule::kWrites | more, l)>(lists, i, x[l]), ...);
  }
}

// Updates `count` elements of a row and takes the sums over those of the next, which begin rows.length further;
// `readable` more may be looked at.
template <typename Rule, bool rare, int... l, typename... Lists>
FC_INLINE void update_and_sum(const typename Rule::Coefficients& coefficients, const typename Rule::Row& its_row,
                              const Rows& rows, long long count, long long readable, double* sums, Indices<l...> all,
                              Lists* __restrict... lists) {
  constexpr unsigned int used = Rule::kReads | Rule::kFirstReads | Rule::kRare;
  const typename Rule::Coefficients c = coefficients;
  const typename Rule::Row row = its_row;
  double lanes[Rule::kSums][kLanes] = {};
  long long i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    update_elements<Rule, false, rare>(c, row, kLanes, all, advanced<has(used, l)>(lists, i)...);
    add_terms<Rule, true, false>(c, rows, 0, 0, kLanes, kLanes, lanes, all,
                                 advanced<has(used, l)>(lists, i + rows.length)...);
  }
  if (i < count) {
    update_elements<Rule, false, rare>(c, row, count - i, all, advanced<has(used, l)>(lists, i)...);
    add_last_terms<Rule, false>(c, rows, static_cast<int>(count - i), readable, lanes, all,
                                advanced<has(used, l)>(lists, i + rows.length)...);
  }
  for (int k = 0; k < Rule::kSums; ++k) {
    sums[k] = add_lanes(lanes[k]);
  }
}

template <bool taken, typename Storage>
FC_INLINE void fetch_list(const Storage* list, long long count) {
  constexpr long long line = 64 / sizeof(Storage);
  for (long long i = 0; taken && i < count; i += line) __builtin_prefetch(list + i, 0, 2);
}

// Asks for elements of some lists. To read, also where they will be written: asking to write them costs what it saves.
template <typename Rule, unsigned int lists, int... l>
FC_INLINE void fetch(const Table& table, long long tensor, long long begin, long long count, Indices<l...>) {
  (fetch_list<has(lists, l)>(list_at<Rule, l>(table, tensor, begin), count), ...);
}

// The sums over a segment of any row, compiled once. Hot loops have sums of their own inlined.
template <typename Rule>
struct SumSegment {
  static FC_INLINE void run(const typename Rule::Coefficients* c, const Table* table, long long tensor, long long row,
                            long long segment, double* sums) {
    sum_segment<Rule>(*c, *table, tensor, table->rows(tensor), row, segment, sums,
                      typename MakeIndices<Rule::kLists>::type());
  }
};

template <typename Rule>
using SumSegmentFunction = void (*)(const typename Rule::Coefficients*, const Table*, long long, long long, long long,
                                    double*);

// Updates rows whose sums one thread takes on the way.
template <typename Rule>
struct UpdateRows {
  using Coefficients = typename Rule::Coefficients;
  using RowValue = typename Rule::RowValue;
  using Row = typename Rule::Row;
  using All = typename MakeIndices<Rule::kLists>::type;
  // Only dtypes that models are trained in have loops for short rows and for two rows at a time.
  static constexpr bool kTuned = !Rule::kRowIsTensor && !std::is_same_v<typename Rule::Param, double> &&
                                 !std::is_same_v<typename Rule::Param, float16> &&
                                 std::is_same_v<typename Rule::State, float>;

  static FC_INLINE void run(const Coefficients* c, const Table* table, long long tensor, long long begin, long long end,
                            SumSegmentFunction<Rule> sum) {
    const Rows rows = table->rows(tensor);
    const bool rare = Rule::kRare && Rule::is_rare(*c);
    if constexpr (!Rule::kRowIsTensor) {
      if (rows.length == 1) {
        rare ? single<true>(*c, *table, tensor, begin, end - begin, All())
             : single<false>(*c, *table, tensor, begin, end - begin, All());
        return;
      }
    }
    if constexpr (kTuned) {
      if (rows.length <= kShortRow) {
        const long long fit = kShortChunk / rows.length;
        for (; begin < end; begin += fit) {
          const long long stop = std::min(end, begin + fit);
          rare ? short_rows<true>(*c, *table, tensor, rows, begin, stop, All())
               : short_rows<false>(*c, *table, tensor, rows, begin, stop, All());
        }
        return;
      }
    }
    Row row = Rule::no_row(*c);
    for (bool is_known = false; begin < end; ++begin) {
      if (!is_known) row = its_row(*c, *table, tensor, rows, begin, sum);
      is_known = kTuned && begin + 1 < end;
      if constexpr (kTuned) {
        if (is_known) {
          row = rare ? with_next<true>(*c, row, *table, tensor, rows, begin, All())
                     : with_next<false>(*c, row, *table, tensor, rows, begin, All());
          continue;
        }
      }
      update_run<Rule, false>(*c, row, *table, tensor, begin * rows.length, rows.length, All());
    }
  }

 private:
  // Updates a row while taking the sums over the next, which keeps memory busy and costs little time of its own: most
  // of an update is waiting for roots and quotients.
  template <bool rare, int... l>
  static FC_INLINE Row with_next(const Coefficients& c, const Row& row, const Table& table, long long tensor,
                                 const Rows& rows, long long number, Indices<l...> all) {
    double segments[kLocalRow / kSegment][Rule::kSums], sums[Rule::kSums];
    const long long after = table.numel(tensor) - (number + 2) * rows.length;
    for (long long s = 0; s < rows.segments(); ++s) {
      const long long at = number * rows.length + s * kSegment, count = std::min(kSegment, rows.length - s * kSegment);
      update_and_sum<Rule, rare>(c, row, rows, count, rows.length - s * kSegment - count + after, segments[s], all,
                                 list_at<Rule, l>(table, tensor, at)...);
    }
    sum_row<Rule>(segments[0], rows.segments(), Rule::kSums, sums);
    return Rule::row(c, sums, rows.length, table, tensor, number + 1);
  }

  static FC_INLINE Row its_row(const Coefficients& c, const Table& table, long long tensor, const Rows& rows,
                               long long row, SumSegmentFunction<Rule> sum) {
    double segments[kLocalRow / kSegment][Rule::kSums], sums[Rule::kSums];
    for (long long s = 0; s < rows.segments(); ++s) sum(&c, &table, tensor, row, s, segments[s]);
    sum_row<Rule>(segments[0], rows.segments(), Rule::kSums, sums);
    return Rule::row(c, sums, rows.length, table, tensor, row);
  }

  template <bool rare, int... l>
  static FC_INLINE void short_rows(const Coefficients& c, const Table& table, long long tensor, const Rows& rows,
                                   long long begin, long long end, Indices<l...> all) {
    Row found[kShortChunk / 2];
    for (long long r = begin; r < end; ++r) {
      // Sums take few lists and much time, the update the other way round: memory is to be busy all the time.
      fetch<Rule, Rule::kReads & ~Rule::kFirstReads>(table, tensor, r * rows.length, rows.length, all);
      double sums[Rule::kSums];
      const long long at = r * rows.length, readable = table.numel(tensor) - at - rows.length;
      sum_elements<Rule>(c, rows, rows.length, readable, sums, all, list_at<Rule, l>(table, tensor, at)...);
      found[r - begin] = Rule::row(c, sums, rows.length, table, tensor, r);
    }
    if (end < rows.count) {
      fetch<Rule, Rule::kFirstReads>(table, tensor, end * rows.length, kShortChunk, all);
    } else if (tensor + 1 < table.tensors()) {
      fetch<Rule, Rule::kFirstReads>(table, tensor + 1, 0, std::min(kShortChunk, table.numel(tensor + 1)), all);
    }
    // A row's values are written in whole vectors, over the place of the next row's, which come after.
    RowValue repeated[kRowValues<Rule> * kPlane];
    for (int k = 0; k < kRowValues<Rule>; ++k) {
      for (long long r = 0; r < end - begin; ++r) {
        const RowValue value = reinterpret_cast<const RowValue*>(&found[r])[k];
        RowValue* out = repeated + k * kPlane + r * rows.length;
        for (long long i = 0; i < rows.length; i += kRepeat) {
          for (int j = 0; j < kRepeat; ++j) out[i + j] = value;
        }
      }
    }
    update_short<Rule, rare>(c, repeated, (end - begin) * rows.length, all,
                             list_at<Rule, l>(table, tensor, begin * rows.length)...);
  }

  template <bool rare, int... l>
  static FC_INLINE void single(const Coefficients& c, const Table& table, long long tensor, long long begin,
                               long long count, Indices<l...> all) {
    update_single<Rule, rare>(c, table, tensor, begin, count, all, list_at<Rule, l>(table, tensor, begin)...);
  }
};

// Where batches of tensors begin, and where the last one ends.
inline std::vector<long long> in_batches(const std::vector<long long>& elements) {
  const long long tensors = static_cast<long long>(elements.size()) - 1;
  std::vector<long long> begins = {0};
  for (long long t = 1; t < tensors; ++t) {
    if (elements[t + 1] - elements[begins.back()] > kBatch) begins.push_back(t);
  }
  begins.push_back(tensors);
  return begins;
}

// The whole op on host memory. Returns whether it wrote the rule's rare lists.
template <typename Rule>
bool run_rule(const Args& args) {
  using Coefficients = typename Rule::Coefficients;
  if (args.skips()) return false;
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

  const auto elements_function = Clones<UpdateElements<Rule>>::template select<const Coefficients*, const Table*,
                                                                               long long, long long, long long>();
  const auto update_elements = [&](long long t, long long begin, long long end) {
    elements_function(&coefficients[which[t]], &table, t, begin, end);
  };
  const auto elements = running_totals(table, [&](long long t) { return table.numel(t); });
  const bool parallel = elements.back() > kSerialElements;
  if constexpr (Rule::kSums == 0) {
#pragma omp parallel if (parallel)
    for_my_share(elements, 0, table.tensors(), kRangeAlignment, update_elements);
  } else {
    static_assert(sizeof(typename Rule::Row) <= kRowWords * sizeof(double));
    using Sum = SumSegmentFunction<Rule>;
    const Sum sum = Clones<SumSegment<Rule>>::template select<const Coefficients*, const Table*, long long, long long,
                                                              long long, double*>();
    const auto update_rows = Clones<UpdateRows<Rule>>::template select<const Coefficients*, const Table*, long long,
                                                                       long long, long long, Sum>();
    const auto sum_segments = [&](long long t, long long begin, long long end) {
      const Rows r = table.rows(t);
      for (long long s = begin; s < end; ++s) {
        const long long row = s / r.segments(), segment = s % r.segments();
        sum(&coefficients[which[t]], &table, t, row, segment, table.segment_scratch(r, row, segment));
      }
    };
    const auto finish_rows = [&](long long t, long long begin, long long end) {
      const Rows r = table.rows(t);
      double sums[Rule::kSums];
      for (long long row = begin; row < end; ++row) {
        sum_row<Rule>(table.segment_scratch(r, row, 0), r.segments(), kRowWords, sums);
        *reinterpret_cast<typename Rule::Row*>(table.row_scratch(r, row)) =
            Rule::row(coefficients[which[t]], sums, r.length, table, t, row);
      }
    };
    const auto with_scratch = [&](auto size) {
      return running_totals(table, [&, size](long long t) { return table.rows(t).scratch ? size(table.rows(t)) : 0; });
    };
    const auto rows = with_scratch([](const Rows& r) { return r.count; });
    const auto segments = with_scratch([](const Rows& r) { return r.count * r.segments(); });
    const auto batches = rows.back() ? in_batches(elements) : std::vector<long long>{0, table.tensors()};
#pragma omp parallel if (parallel)
    for (size_t b = 1; b < batches.size(); ++b) {
      const long long first = batches[b - 1], last = batches[b];
      if (rows[first] < rows[last]) {
        for_my_share(segments, first, last, 1, sum_segments);
#pragma omp barrier
        for_my_share(rows, first, last, 1, finish_rows);
#pragma omp barrier
      }
      for_my_share(elements, first, last, kRangeAlignment, [&](long long t, long long begin, long long end) {
        const Rows r = table.rows(t);
        // Whole rows: those that begin in this thread's share.
        if (!r.local()) return update_elements(t, begin, end);
        update_rows(&coefficients[which[t]], &table, t, (begin + r.inner - 1) / r.inner, (end + r.inner - 1) / r.inner,
                    sum);
      });
    }
  }
  return std::any_of(coefficients.begin(), coefficients.end(), [](const Coefficients& c) { return Rule::is_rare(c); });
}

// The same for the dtypes of a call.
template <template <typename, typename, int> class Rule, int variant>
bool run_rule(const Args& args, Dtype param, Dtype state) {
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
