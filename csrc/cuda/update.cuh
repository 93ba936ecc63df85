// The elementwise part of every rule: a chunk by packs of 16 bytes. A thread has all the loads of a pack on their way
// before it uses the first: at 768 threads a multiprocessor that is 48 KB or more with four lists, where the latency of
// an H200 times its bandwidth is 22 to 29 KB. No cache hints: every line is used once a step, and written where it is
// read.
#pragma once
#include "common.cuh"

namespace fastcurv {

constexpr unsigned long long narrowest(unsigned long long size) { return size; }
template <typename... Sizes>
constexpr unsigned long long narrowest(unsigned long long size, Sizes... sizes) {
  const unsigned long long rest = narrowest(sizes...);
  return size < rest ? size : rest;
}

// A list that is read in both passes over the rows of a chunk and written in neither: it is kept in shared memory in
// between, as far as that is large enough.
template <typename Rule>
constexpr unsigned int kStagedList =
    Rule::kSums && sizeof(typename Rule::Param) <= 4
        ? Rule::kReads & Rule::kFirstReads & ~(Rule::kWrites | Rule::kFirstWrites | Rule::kRare)
        : 0;

// Rows of a chunk, as update_chunk() takes them: at(i) is a cursor that has the row of element i, next() moves it to
// the next element; kStaged are the lists whose elements are at `stage` and not in the table.

// The same for all elements.
template <typename Rule>
struct OneRow {
  using Row = typename Rule::Row;
  static constexpr unsigned int kStaged = 0;
  static constexpr bool kIsScattered = false;
  Row row;

  struct Cursor {
    Row row;
    __device__ __forceinline__ void next() {}
  };
  __device__ __forceinline__ Cursor at(unsigned int) const { return {row}; }
};

// Whole rows of one length, in shared memory.
template <typename Rule>
struct TileRows {
  using Row = typename Rule::Row;
  static constexpr unsigned int kStaged = kStagedList<Rule>;
  static constexpr bool kIsScattered = false;
  const Row* rows;
  const typename Rule::Param* stage;
  unsigned int length;

  struct Cursor {
    const Row* rows;
    unsigned int length, left;
    Row row;
    __device__ __forceinline__ void next() {
      if (--left) return;
      left = length;
      row = *++rows;
    }
  };
  __device__ __forceinline__ Cursor at(unsigned int i) const {
    const unsigned int r = i / length;
    return {rows + r, length, (r + 1) * length - i, rows[r]};
  }
};

// Rows of a tensor whose sums were taken by kernels before this one. The chunk begins `offset` elements into a run of
// row `first`. A run of 2^31 or more elements counts as one of 2^31 that ends where it does: no chunk sees its
// beginning and its end.
template <typename Rule>
struct ScratchRows {
  using Row = typename Rule::Row;
  static constexpr unsigned int kStaged = 0;
  static constexpr bool kIsScattered = true;
  static constexpr long long kFar = 1ll << 31;
  const double* scratch;  // of row 0
  long long first, count;
  unsigned int length, offset;

  __device__ __forceinline__ ScratchRows(const Table& table, const Rows& rows, long long begin)
      : scratch(table.row_scratch(rows, 0)), first(rows.row_at(begin)), count(rows.count) {
    const long long rest = rows.inner - begin % rows.inner;
    length = static_cast<unsigned int>(rows.inner < kFar ? rows.inner : kFar);
    offset = length - static_cast<unsigned int>(rest < kFar ? rest : kFar);
  }
  __device__ __forceinline__ bool is_one(unsigned int elements) const { return length - offset >= elements; }
  __device__ __forceinline__ Row row(long long number) const {
    return *reinterpret_cast<const Row*>(scratch + number * kRowWords);
  }

  struct Cursor {
    const ScratchRows& rows;
    long long number;
    unsigned int left;
    Row row;
    __device__ __forceinline__ void next() {
      if (--left) return;
      left = rows.length;
      number = number + 1 == rows.count ? 0 : number + 1;
      row = rows.row(number);
    }
  };
  __device__ __forceinline__ Cursor at(unsigned int i) const {
    const unsigned int run = (offset + i) / length;
    long long number = first + run;
    if (number >= count) {  // of 2^31 or more rows a chunk does not see all; of fewer the sum fits into 32 bits
      number = count < kFar ? static_cast<unsigned int>(number) % static_cast<unsigned int>(count) : number - count;
    }
    return {*this, number, (run + 1) * length - (offset + i), row(number)};
  }
};

template <int l, typename Value>
struct Held {
  Value value;
};
template <int l, typename Value>
__device__ __forceinline__ Value& held(Held<l, Value>& holder) {
  return holder.value;
}

template <typename Rule, typename All = typename MakeIndices<Rule::kLists>::type>
struct Update;

template <typename Rule, int... l>
struct Update<Rule, Indices<l...>> {
  using T = typename Rule::T;
  using Coefficients = typename Rule::Coefficients;

  // Lists that no step of the rule takes may be absent.
  static constexpr unsigned int kUsed = Rule::kReads | Rule::kFirstReads | Rule::kRare;
  // How many elements the narrowest list puts into 16 bytes.
  static constexpr int kWidth = 16 / narrowest((has(kUsed, l) ? sizeof(Stored<Rule, l>) : 16)...);
  // Where more is kept of each element, as many as the arithmetic type, the widest, puts there.
  template <typename Rows, bool rare>
  static constexpr int kWidthFor = rare || Rows::kIsScattered ? 16 / sizeof(T) : kWidth;

  template <int width>
  struct Packs : Held<l, Pack<Stored<Rule, l>, width>>... {};

  template <unsigned int lists, int number>
  static __device__ __forceinline__ Stored<Rule, number>* list(const Table& table, const Chunk& chunk,
                                                               unsigned int more = 0) {
    if constexpr (has(lists, number)) {
      return table.pointer<Stored<Rule, number>>(chunk.tensor, number) + chunk.begin + more;
    } else {
      return nullptr;
    }
  }

  template <bool taken, bool staged, int width, typename Rows, typename Storage>
  static __device__ __forceinline__ void load_list(Pack<Storage, width>& pack, const Rows& rows, const Storage* list,
                                                   unsigned int i) {
    if constexpr (taken && staged) {
      pack = load_pack<width>(rows.stage + i);
    } else if constexpr (taken) {
      pack = load_pack<width>(list);
    }
  }
  template <bool taken, int width, typename Storage>
  static __device__ __forceinline__ void store_list(Storage* list, const Pack<Storage, width>& pack) {
    if constexpr (taken) store_pack<width>(list, pack);
  }
  template <bool taken, int width, typename Storage>
  static __device__ __forceinline__ T value(const Pack<Storage, width>& pack, int k) {
    if constexpr (taken) {
      return load(pack.values[k]);
    } else {
      return T(0);
    }
  }
  template <bool taken, int width, typename Storage>
  static __device__ __forceinline__ void set_value(Pack<Storage, width>& pack, int k, T value) {
    if constexpr (taken) store(pack.values[k], value);
  }

  // Elements i to i + width - 1 of a chunk; `lists` point to the first of them.
  template <bool with_first, bool rare, int width, typename Rows>
  static __device__ __forceinline__ void pack(const Coefficients& c, const Rows& rows, unsigned int i,
                                              Stored<Rule, l>*... lists) {
    constexpr unsigned int more = rare ? Rule::kRare : 0;
    constexpr unsigned int reads = Rule::kReads | more | (with_first ? Rule::kFirstReads : 0);
    constexpr unsigned int writes = Rule::kWrites | more | (with_first ? Rule::kFirstWrites : 0);
    Packs<width> packs;
    (load_list<has(reads, l), has(Rows::kStaged, l), width>(held<l>(packs), rows, lists, i), ...);
    auto cursor = rows.at(i);
#pragma unroll
    for (int k = 0; k < width; ++k) {
      if (k) cursor.next();
      T x[] = {value<has(reads, l), width>(held<l>(packs), k)...};
      if constexpr (with_first && Rule::kSums > 0) {
        double terms[Rule::kSums];
        Rule::first(c, x, terms);
      }
      Rule::element(c, cursor.row, x);
      if constexpr (rare) Rule::rare(c, x);
      (set_value<has(writes, l), width>(held<l>(packs), k, x[l]), ...);
    }
    (store_list<has(writes, l), width>(lists, held<l>(packs)), ...);
  }

  template <bool with_first, bool rare, typename Rows>
  static __device__ __forceinline__ void packs(const Coefficients& c, const Rows& rows, unsigned int begin,
                                               unsigned int end, Stored<Rule, l>*... lists) {
    constexpr int width = kWidthFor<Rows, rare>;
    const unsigned int stride = blockDim.x * width;
    unsigned int i = begin + threadIdx.x * width;
    ((lists += i), ...);
    for (; i < end; i += stride, ((lists += stride), ...)) pack<with_first, rare, width>(c, rows, i, lists...);
  }
  template <bool with_first, bool rare, typename Rows>
  static __device__ __forceinline__ void singles(const Coefficients& c, const Rows& rows, unsigned int count,
                                                 const Split& split, Stored<Rule, l>*... lists) {
    for (unsigned int j = threadIdx.x; j < count - split.packed; j += blockDim.x) {
      const unsigned int i = j < split.head ? j : j + split.packed;
      pack<with_first, rare, 1>(c, rows, i, (lists + i)...);
    }
  }

  template <typename Rows, unsigned int lists>
  static __device__ __forceinline__ Split parts(const Table& table, const Chunk& chunk) {
    return split<kWidth>(chunk, aligned16(list<lists & ~Rows::kStaged, l>(table, chunk, head_of<kWidth>(chunk))...));
  }

  template <bool with_first, bool rare, typename Rows>
  static __device__ __forceinline__ void chunk(const Coefficients& c, const Table& table, unsigned int index,
                                               const Rows& rows) {
    constexpr unsigned int lists = Rule::kReads | (with_first ? Rule::kFirstReads : 0) | (rare ? Rule::kRare : 0);
    {
      const Chunk at = chunk_at<Rule>(table, index);
      const Split split = parts<Rows, lists>(table, at);
      packs<with_first, rare>(c, rows, split.head, split.head + split.packed, list<lists, l>(table, at)...);
    }
    // All is taken out of the table again for the elements that are in no pack: it would cost the first loop twenty
    // registers to keep it.
    const Chunk at = chunk_at<Rule>(table, anew(index));
    const Split split = parts<Rows, lists>(table, at);
    if (split.packed == at.count) return;
    singles<with_first, rare>(c, rows, at.count, split, list<lists, l>(table, at)...);
  }
};

// Updates the elements of a chunk (`with_first`: first() has not been there).
template <typename Rule, bool with_first, typename Rows>
__device__ __forceinline__ void update_chunk(const typename Rule::Coefficients& c, const Table& table,
                                             unsigned int index, const Rows& rows) {
  if constexpr (Rule::kRare != 0) {
    if (Rule::is_rare(c)) return Update<Rule>::template chunk<with_first, true>(c, table, index, rows);
  }
  Update<Rule>::template chunk<with_first, false>(c, table, index, rows);
}

}  // namespace fastcurv
