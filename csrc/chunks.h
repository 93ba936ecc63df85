// Builds chunk tables (table.h) and says when one is out of date.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "table.h"
#include "tensor_view.h"

namespace fastcurv {

// Remembers every tensor of a set of lists: type, dtype, device, shape, strides and address of each, compared in full
// at every call. A key of addresses alone would be wrong: the caching allocator hands the same address to tensors of
// other sizes. Metadata is accepted only from a caller that has checked it, so a match needs no further check.
class ChunkTable {
 public:
  enum Change : int { kSame = 0, kMoved = 1, kOther = 2 };

  // is_mutated[l]: list l is written to, and its tensors must not overlap one another.
  explicit ChunkTable(std::vector<bool> is_mutated) : is_mutated_(std::move(is_mutated)) {}

  // kSame: nothing changed. kMoved: only addresses did. kOther: anything else did, and nothing was recorded, unless
  // `accept` is set. Raises ValueError when two mutated tensors overlap in memory, naming them by `names`.
  Change update(const pybind11::sequence& lists, const pybind11::sequence& names, bool accept);

  // The lists of an optimizer: parameters, their gradients, and for each key that is not None the entries of their
  // states, which are dicts. No list at all where there are more or fewer parameters than remembered, or a key is
  // missing.
  std::vector<pybind11::list> gather(const pybind11::list& params, const pybind11::list& states,
                                     const pybind11::tuple& keys) const;

  // How long the table is: all of its words, those that write() fills (the rest is scratch), chunks, and partials.
  struct Size {
    int64_t words, written, chunks, partials;
  };
  // `rows`: how parameters, the first list, are divided into rows: kNoRows, kTensorRows, or by dim 0 from that number
  // of dimensions on.
  Size size(int64_t chunk_elements, int rows) const;
  void write(int64_t* out, int64_t chunk_elements, int rows) const;

  static constexpr int kNoRows = -2, kTensorRows = -1;

 private:
  struct Entry {
    PyTypeObject* type;
    int dtype;
    dlpack::Device device;
    int ndim;
    int64_t numel;
    size_t shape;  // offset in shapes_: ndim sizes, then ndim strides
    // Where Python keeps the object, and torch the tensor and its storage: to prefetch, never to read.
    uintptr_t object, tensor, storage;
  };

  void prefetch(size_t k) const;
  Change move_to(std::vector<uintptr_t> pointers, const pybind11::sequence& names);
  bool matches(const Entry& entry, PyObject* object, const TensorView& view) const;
  void require_disjoint(const std::vector<uintptr_t>& pointers, const pybind11::sequence& names) const;
  int64_t tensors() const { return lists_ ? static_cast<int64_t>(entries_.size()) / lists_ : 0; }
  Rows rows_of(int64_t tensor, int rows) const;

  std::vector<bool> is_mutated_;
  int lists_ = 0;               // lists that hold tensors
  std::vector<int> present_;    // their numbers
  std::vector<Entry> entries_;  // list after list
  std::vector<int64_t> shapes_;
  std::vector<uintptr_t> pointers_;
};

}  // namespace fastcurv
