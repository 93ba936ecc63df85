#include "chunks.h"

#include <algorithm>
#include <cstring>

#include "table.h"

namespace py = pybind11;

namespace fastcurv {
namespace {

constexpr int kAhead = 6;  // tensors: five cache lines each, of about two dozen that a core can wait for

int64_t item_size(int dtype) {
  switch (static_cast<Dtype>(dtype)) {
    case Dtype::float64: return 8;
    case Dtype::float32: return 4;
    default: return 2;
  }
}

uintptr_t address_of(const py::object& holder) {
  return py::hasattr(holder, "_cdata") ? holder.attr("_cdata").cast<uintptr_t>() : 0;
}

}  // namespace

// A training step has filled the caches with weights by the time the lists are read: looking at a tensor then costs
// five misses in a row, four times what it costs warm. Prefetching cannot fault, so addresses that went stale do no
// harm.
void ChunkTable::prefetch(PyObject* object, size_t k) const {
  __builtin_prefetch(object);
  const uintptr_t tensor = entries_[k].inside[0], storage = entries_[k].inside[1];
  for (int line = 0; line < 4; ++line) __builtin_prefetch(reinterpret_cast<const char*>(tensor) + 64 * line);
  __builtin_prefetch(reinterpret_cast<const char*>(storage));
}

bool ChunkTable::matches(const Entry& entry, PyObject* object, const TensorView& view) const {
  const size_t bytes = entry.ndim * sizeof(int64_t);
  const int64_t* shape = shapes_.data() + entry.shape;
  return entry.type == Py_TYPE(object) && entry.dtype == view.dtype && entry.device.type == view.device.type &&
         entry.device.id == view.device.id && entry.ndim == view.ndim && !std::memcmp(shape, view.shape, bytes) &&
         !std::memcmp(shape + entry.ndim, view.strides, bytes);
}

ChunkTable::Change ChunkTable::update(const py::sequence& lists, const py::sequence& names, bool accept) {
  std::vector<int> present;
  std::vector<Entry> entries;
  std::vector<int64_t> shapes;
  std::vector<uintptr_t> pointers;
  pointers.reserve(pointers_.size());
  size_t k = 0;
  for (size_t l = 0; l < lists.size(); ++l) {
    const py::object held = lists[l];
    PyObject* list = PySequence_Fast(held.ptr(), "expected a list of tensors");
    if (!list) throw py::error_already_set();
    const py::object owner = py::reinterpret_steal<py::object>(list);
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(list);
    if (size) present.push_back(static_cast<int>(l));
    PyObject** items = PySequence_Fast_ITEMS(list);
    TensorView view;
    for (Py_ssize_t i = 0; i < size; ++i, ++k) {
      if (!accept && k >= entries_.size()) return kOther;
      if (!accept && i + kAhead < size && k + kAhead < entries_.size()) prefetch(items[i + kAhead], k + kAhead);
      if (!view_tensor(items[i], view)) {
        if (accept) throw py::type_error("a list holds an object that is no dense tensor");
        return kOther;
      }
      if (accept) {
        const auto tensor = py::reinterpret_borrow<py::object>(items[i]);
        entries.push_back({Py_TYPE(items[i]),
                           view.dtype,
                           view.device,
                           view.ndim,
                           view.numel,
                           shapes.size(),
                           {address_of(tensor), address_of(tensor.attr("untyped_storage")())}});
        shapes.insert(shapes.end(), view.shape, view.shape + view.ndim);
        shapes.insert(shapes.end(), view.strides, view.strides + view.ndim);
      } else if (!matches(entries_[k], items[i], view)) {
        return kOther;
      }
      pointers.push_back(reinterpret_cast<uintptr_t>(view.pointer));
    }
  }
  if (!accept && (k != entries_.size() || present != present_)) return kOther;
  if (accept) {
    if (!present.empty() && entries.size() % present.size()) throw py::value_error("lists of different lengths");
    entries_ = std::move(entries);
    shapes_ = std::move(shapes);
    present_ = std::move(present);
    lists_ = static_cast<int>(present_.size());
    pointers_.clear();
  }
  if (pointers == pointers_) return accept ? kOther : kSame;
  require_disjoint(pointers, names);
  pointers_ = std::move(pointers);
  return accept ? kOther : kMoved;
}

void ChunkTable::require_disjoint(const std::vector<uintptr_t>& pointers, const py::sequence& names) const {
  struct Extent {
    uintptr_t begin, end;
    size_t k;
  };
  std::vector<Extent> extents;
  const size_t n = static_cast<size_t>(tensors());
  bool moved = pointers_.empty();
  for (size_t k = 0; k < entries_.size(); ++k) {
    if (!is_mutated_[present_[k / n]] || entries_[k].numel == 0) continue;
    moved = moved || pointers[k] != pointers_[k];
    extents.push_back({pointers[k], pointers[k] + entries_[k].numel * item_size(entries_[k].dtype), k});
  }
  if (!moved) return;
  std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  for (size_t j = 1; j < extents.size(); ++j) {
    if (extents[j].begin >= extents[j - 1].end) continue;
    const auto name = [&](size_t k) {
      return names[present_[k / n]].cast<std::string>() + "[" + std::to_string(k % n) + "]";
    };
    const size_t first = std::min(extents[j - 1].k, extents[j].k), second = std::max(extents[j - 1].k, extents[j].k);
    throw py::value_error(name(second) + ": expected memory of its own, but it overlaps " + name(first) +
                          "; an in-place update of both would depend on their order. Pass each parameter once, and "
                          "no two views of the same elements");
  }
}

int64_t ChunkTable::chunks(int64_t chunk_elements) const {
  int64_t count = 0;
  for (int64_t t = 0; t < tensors(); ++t) count += (entries_[t].numel + chunk_elements - 1) / chunk_elements;
  return count;
}

int64_t ChunkTable::words(int64_t chunk_elements) const {
  return kTableHeader + tensors() * (1 + static_cast<int64_t>(is_mutated_.size())) + chunks(chunk_elements);
}

void ChunkTable::write(int64_t* out, int64_t chunk_elements) const {
  const int64_t n = tensors();
  const int64_t columns = 1 + static_cast<int64_t>(is_mutated_.size());
  std::fill(out, out + kTableHeader + n * columns, 0);
  out[0] = n;
  out[1] = chunks(chunk_elements);
  out[2] = columns - 1;
  out[3] = chunk_elements;
  int64_t* records = out + kTableHeader;
  int64_t* chunk = records + n * columns;
  for (int64_t t = 0; t < n; ++t) {
    records[t * columns] = entries_[t].numel;
    for (int l = 0; l < lists_; ++l) {
      records[t * columns + 1 + present_[l]] = static_cast<int64_t>(pointers_[l * n + t]);
    }
    for (int64_t c = 0; c * chunk_elements < entries_[t].numel; ++c) *chunk++ = (t << 32) | c;
  }
}

}  // namespace fastcurv
