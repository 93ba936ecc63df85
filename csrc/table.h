// The chunk table: what a multi-tensor kernel knows of its lists. One array of 64-bit words, in host or device memory.
//
//   word 0  tensors   number of tensors in each list
//   word 1  chunks    number of chunks
//   word 2  lists     number of lists, absent ones included (their pointers are null)
//   word 3  chunk     elements in a chunk
//   word 4  ticket    counts finished blocks; a device kernel leaves it at zero
//   word 5..7         zero
//   then, for each tensor: numel, one pointer per list
//   then, for each chunk: tensor * 2^32 + number of the chunk within its tensor
#pragma once
#include "numeric.h"

namespace fastcurv {

constexpr int kTableHeader = 8;
constexpr int kTicket = 4;

struct Table {
  const long long* words;

  FC_INLINE long long tensors() const { return words[0]; }
  FC_INLINE long long chunks() const { return words[1]; }
  FC_INLINE long long lists() const { return words[2]; }
  FC_INLINE long long chunk_elements() const { return words[3]; }
  FC_INLINE const long long* record(long long tensor) const { return words + kTableHeader + tensor * (1 + lists()); }
  FC_INLINE long long numel(long long tensor) const { return *record(tensor); }
  template <typename T>
  FC_INLINE T* pointer(long long tensor, int list) const {
    return reinterpret_cast<T*>(record(tensor)[1 + list]);
  }
  FC_INLINE unsigned long long chunk(long long index) const {
    return static_cast<unsigned long long>(record(tensors())[index]);
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

}  // namespace fastcurv
