// The chunk table: what a multi-tensor kernel knows of its lists. One array of 64-bit words, in host or device memory.
//
//   word 0  tensors   number of tensors in each list
//   word 1  chunks    number of chunks
//   word 2  lists     number of lists, absent ones included (their pointers are null)
//   word 3  chunk     elements of a chunk where rows do not say otherwise
//   word 4  ticket    counts finished blocks; a device kernel leaves it at zero
//   word 5  partials  number of partials: groups of kGroup segments whose sums are taken before anything is updated
//   word 6, 7         zero
//   then, for each tensor: numel, rows, inner, scratch, one pointer per list
//   then, for each chunk: tensor * 2^32 + number of the chunk within its tensor
//   then, for each partial: tensor * 2^32 + number of the group within its tensor
//   then scratch: for each segment and then for each row of some tensors, kRowWords doubles
//
// Rows. Some ops need sums over the rows of a tensor: over its slices along dim 0, or over all of it. In memory, row r
// is made of the runs of `inner` elements that begin at (a * rows + r) * inner, for a = 0, 1, ...; mostly there is one
// run, and rows follow each other. A tensor whose rows are contiguous and no longer than kLocalRow is divided into
// chunks of whole rows, and a block, or a thread of the CPU, takes the sums itself. In others (`scratch` is not zero
// then: the number of the table's word where its scratch begins) the sums are taken before, and chunks are cut
// anywhere.
//
// Sums are taken in double and in a fixed order, so that they have the same bits everywhere: a row is cut into segments
// of kSegment elements; element i of a segment is added to lane i mod kLanes, lanes are added in halves (lane j and
// lane j + kLanes / 2, and so on), and so are, in the same way, the sums of the segments of a row.
#pragma once
#include "numeric.h"

namespace fastcurv {

constexpr int kTableHeader = 8;
constexpr int kTicket = 4;
constexpr int kRecord = 4;    // words of a tensor before its pointers
constexpr int kRowWords = 5;  // doubles that are kept of a segment or row; no op needs more
constexpr int kLanes = 32;
constexpr long long kSegment = 2048;
constexpr long long kGroup = 8;    // segments
constexpr long long kTile = 8192;  // elements that a chunk of whole rows has at the most, where it has several
constexpr long long kTileRows = 512;
constexpr long long kLocalRow = 32768;

struct Rows {
  long long count;  // 0: the tensor has none
  long long inner;
  long long length;
  long long scratch;

  FC_INLINE bool local() const { return count && !scratch; }
  FC_INLINE long long segments() const { return (length + kSegment - 1) / kSegment; }
  // Whole rows of a chunk where rows are local: by eights where they are many, so that chunks of most tensors begin at
  // multiples of 16 bytes.
  FC_INLINE long long rows_per_chunk() const {
    const unsigned int fit = static_cast<unsigned int>(kTile) / static_cast<unsigned int>(inner);
    const unsigned int most = fit < kTileRows ? fit : kTileRows;
    return most < 1 ? 1 : most < 8 ? most : most / 8 * 8;
  }
  // Position in the tensor of element i of a row.
  FC_INLINE long long position(long long row, long long i) const {
    return inner == length ? row * length + i : (i / inner * count + row) * inner + i % inner;
  }
  // Row of the element at a position.
  FC_INLINE long long row_at(long long position) const { return position / inner % count; }
};

struct Table {
  long long* words;

  FC_INLINE long long tensors() const { return words[0]; }
  FC_INLINE long long chunks() const { return words[1]; }
  FC_INLINE long long lists() const { return words[2]; }
  FC_INLINE long long chunk_elements() const { return words[3]; }
  FC_INLINE long long partials() const { return words[5]; }
  FC_INLINE long long* record(long long tensor) const { return words + kTableHeader + tensor * (kRecord + lists()); }
  FC_INLINE long long numel(long long tensor) const { return *record(tensor); }
  FC_INLINE Rows rows(long long tensor) const {
    const long long* r = record(tensor);
    return {r[1], r[2], r[1] ? r[0] / r[1] : 0, r[3]};
  }
  // Of a list that is not absent. Without the assumption a compiler of device code takes an address out of the table
  // for one that may as well lie in shared memory: slower generic accesses, and no value kept across a store.
  template <typename T>
  FC_INLINE T* pointer(long long tensor, int list) const {
    T* pointer = reinterpret_cast<T*>(record(tensor)[kRecord + list]);
#if defined(__CUDA_ARCH__)
    __builtin_assume(__isGlobal(pointer));
#endif
    return pointer;
  }
  FC_INLINE unsigned long long chunk(long long index) const {
    return static_cast<unsigned long long>(record(tensors())[index]);
  }
  FC_INLINE unsigned long long partial(long long index) const { return chunk(chunks() + index); }
  // Elements of a chunk of a tensor, but for the last.
  FC_INLINE long long chunk_size(long long tensor) const {
    const Rows r = rows(tensor);
    return r.local() ? r.rows_per_chunk() * r.inner : chunk_elements();
  }
  // What is kept of a segment, or, behind all segments of the tensor, of a row.
  FC_INLINE double* segment_scratch(const Rows& r, long long row, long long segment) const {
    return reinterpret_cast<double*>(words + r.scratch) + (row * r.segments() + segment) * kRowWords;
  }
  FC_INLINE double* row_scratch(const Rows& r, long long row) const {
    return segment_scratch(r, r.count, 0) + row * kRowWords;
  }
};

// How to launch the kernel of a table, whoever does: a grid of this many blocks per multiprocessor, or as many as there
// are chunks.
struct Launch {
  int blocks_per_multiprocessor;
  int threads;
};

// A hyper-parameter: a run-time value, or the address of a one-element tensor that the kernel reads.
struct Scalar {
  double value;
  const float* as_float;
  const double* as_double;

  FC_INLINE double get() const { return as_float ? static_cast<double>(*as_float) : as_double ? *as_double : value; }
};

// The argument of every kernel. Each op numbers its own hyper-parameters and options.
struct Args {
  long long* words;
  Scalar scalars[8];
  long long options[8];
  const float* grad_scale;  // null: 1
  const float* found_inf;   // null: 0; nonzero: nothing is written

  FC_INLINE Table table() const { return {words}; }
  FC_INLINE double scalar(int number) const { return scalars[number].get(); }
  FC_INLINE bool skips() const { return found_inf && *found_inf != 0.0f; }
  // What a gradient is multiplied by before all else.
  FC_INLINE double grad_factor(bool maximize) const {
    return (maximize ? -1.0 : 1.0) / (grad_scale ? static_cast<double>(*grad_scale) : 1.0);
  }
};

}  // namespace fastcurv
