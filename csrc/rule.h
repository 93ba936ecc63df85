// What an op tells the loops of cpu/ and the kernels of cuda/, which are written once for all ops: its rule.
//
// A rule is a class template over <Param, State, variant>: the storage types of parameters and of state, and what else
// changes the memory that is touched. T, the type of the arithmetic, is Compute<Param>::type. Bit l of a set of lists
// stands for list l. A rule has
//
//   kLists, kParamLists, kExactLists   number of lists; those stored as Param, and as T; the others are State
//   kReads, kWrites                    lists that element() takes, and changes
//   Coefficients, coefficients(args, table, tensor)
//                                      all that is the same for the elements of a tensor; a choice between two
//                                      values is a T, 0 or 1, because loops with a bool do not vectorize
//   alike(table, a, b)                 whether two tensors have the same coefficients
//   element(c, row, x)                 updates x[l], the values of an element in each list
//   advance(args, table, tensor)       changes what is kept of a tensor, such as its step, when all else is done
//
// and where ElementRule's defaults will not do
//
//   kRare, is_rare(c), rare(c, x)      lists that are read and written only on some steps, and what comes after
//                                      element() then
//   kSums, kFirstReads, kFirstWrites, first(c, x, terms)
//                                      number of sums over rows (table.h); before element(), first() changes x and says
//                                      what an element adds to each sum
//   kRowIsTensor                       whether a row is all of its tensor, never one of several
//   Row, row(c, sums, length, table, tensor, row), no_row(c)
//                                      what element() is to know of its row, from the sums; row() is called once for
//                                      each row. Row has only members of type RowValue, and at most kRowWords doubles.
//
// Functions are FC_INLINE and use nothing standard, so that every compiler makes the same of them.
#pragma once
#include "table.h"

namespace fastcurv {

// 0, 1, ..., n - 1 as template arguments, for code that goes over lists of different types.
template <int... l>
struct Indices {};
template <int n, int... l>
struct MakeIndices : MakeIndices<n - 1, n - 1, l...> {};
template <int... l>
struct MakeIndices<0, l...> {
  using type = Indices<l...>;
};

template <bool choice, typename A, typename B>
struct Choose {
  using type = A;
};
template <typename A, typename B>
struct Choose<false, A, B> {
  using type = B;
};

constexpr bool has(unsigned int set, int list) { return set >> list & 1; }
template <typename... Lists>
constexpr unsigned int set_of(Lists... lists) {
  return (0u | ... | (1u << lists));
}

// The type that list l of a rule is stored in.
template <typename Rule, int l>
using Stored =
    typename Choose<has(Rule::kParamLists, l), typename Rule::Param,
                    typename Choose<has(Rule::kExactLists, l), typename Rule::T, typename Rule::State>::type>::type;

// The beginnings of a rule: no step count, no rare lists, no sums.
template <typename Param_, typename State_>
struct ElementRule {
  using Param = Param_;
  using State = State_;
  using T = typename Compute<Param>::type;
  using RowValue = T;
  static constexpr unsigned int kExactLists = 0, kRare = 0, kFirstReads = 0, kFirstWrites = 0;
  static constexpr int kSums = 0;
  static constexpr bool kRowIsTensor = false;
  struct Row {};

  static FC_INLINE bool alike(const Table&, long long, long long) { return true; }
  static FC_INLINE void advance(const Args&, const Table&, long long) {}
  template <typename Coefficients>
  static FC_INLINE bool is_rare(const Coefficients&) {
    return false;
  }
  template <typename Coefficients>
  static FC_INLINE void rare(const Coefficients&, T*) {}
  template <typename Coefficients>
  static FC_INLINE void first(const Coefficients&, T*, double*) {}
  template <typename Coefficients>
  static FC_INLINE Row no_row(const Coefficients&) {
    return {};
  }
};

// The same for a rule that counts the steps of each tensor in a list.
template <typename Param, typename State, int step_list>
struct SteppingRule : ElementRule<Param, State> {
  // The number of the step that is being taken.
  static FC_INLINE long long step(const Table& table, long long tensor) {
    return static_cast<long long>(*table.pointer<float>(tensor, step_list)) + 1;
  }
  static FC_INLINE bool alike(const Table& table, long long a, long long b) { return step(table, a) == step(table, b); }
  static FC_INLINE void advance(const Args&, const Table& table, long long tensor) {
    *table.pointer<float>(tensor, step_list) += 1.0f;
  }
};

// How the kernels of all rules are launched. Double takes twice the registers, and twice the bytes to a load: two
// blocks then have as much of memory on its way as three.
constexpr int kThreads = 256;
constexpr Launch launch_of(bool is_double) { return {is_double ? 2 : 3, kThreads}; }

// A factor, as one in the range of T and a power of two.
template <typename T>
struct Factored {
  T value, power;

  FC_INLINE T times(T x) const { return power * (value * x); }
};
FC_INLINE Factored<double> factored(double factor, double) { return {factor, 1.0}; }
FC_INLINE Factored<float> factored(double factor, float) {
  if (factor >= 0x1p128) return {static_cast<float>(factor * 0x1p-126), 0x1p126f};
  if (factor < 0x1p-126) return {static_cast<float>(factor * 0x1p126), 0x1p-126f};
  return {static_cast<float>(factor), 1.0f};
}

// A value as it comes back from storage.
template <typename Storage, typename T>
FC_INLINE T stored(T value) {
  Storage storage;
  store(storage, value);
  return load(storage);
}

}  // namespace fastcurv
