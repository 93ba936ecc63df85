#include "chunks.h"

#include <algorithm>

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

// The hash table of a dict of a few keys.
void prefetch_keys(PyObject* object) {
  if (!PyDict_Check(object)) return;
  const void* const keys = reinterpret_cast<PyDictObject*>(object)->ma_keys;
  for (int line = 0; line < 4; ++line) __builtin_prefetch(static_cast<const char*>(keys) + 64 * line);
}

}  // namespace

// A training step has filled the caches with weights by the time the lists are read: looking at a tensor then costs
// five misses in a row, four times what it costs warm. Prefetching cannot fault, so addresses that went stale do no
// harm.
void ChunkTable::prefetch(size_t k) const {
  const Entry& entry = entries_[k];
  __builtin_prefetch(reinterpret_cast<const char*>(entry.object));
  for (int line = 0; line < 4; ++line) __builtin_prefetch(reinterpret_cast<const char*>(entry.tensor) + 64 * line);
  __builtin_prefetch(reinterpret_cast<const char*>(entry.storage));
}

bool ChunkTable::matches(const Entry& entry, PyObject* object, const TensorView& view) const {
  // Not memcmp, which null is undefined for, be it for no bytes: tensors without dimensions have no shape.
  const int64_t* const shape = shapes_.data() + entry.shape;
  const int64_t* const strides = shape + entry.ndim;
  return entry.type == Py_TYPE(object) && entry.dtype == view.dtype && entry.device.type == view.device.type &&
         entry.device.id == view.device.id && entry.ndim == view.ndim && std::equal(shape, strides, view.shape) &&
         std::equal(strides, strides + entry.ndim, view.strides);
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
      if (!accept && i + kAhead < size && k + kAhead < entries_.size()) prefetch(k + kAhead);
      if (!view_tensor(items[i], view)) {
        if (accept) throw py::type_error("a list holds an object that is no dense tensor");
        return kOther;
      }
      if (accept) {
        const auto tensor = py::reinterpret_borrow<py::object>(items[i]);
        entries.push_back({Py_TYPE(items[i]), view.dtype, view.device, view.ndim, view.numel, shapes.size(),
                           reinterpret_cast<uintptr_t>(items[i]), address_of(tensor),
                           address_of(tensor.attr("untyped_storage")())});
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
  const Change change = move_to(std::move(pointers), names);
  return accept ? kOther : change;
}

// Pass by pass: what is looked at together then is little, and the next of it can be asked for in time. (One pass over
// everything that belongs to a parameter was slower than Python's lists.)
std::vector<py::list> ChunkTable::gather(const py::list& params, const py::list& states, const py::tuple& keys) const {
  static PyObject* const grad = PyUnicode_InternFromString("grad");
  const size_t n = params.size();
  if (n != static_cast<size_t>(tensors()) || n != states.size()) return {};
  std::vector<py::list> lists = {params, py::list(n)};
  for (const auto& key : keys) lists.emplace_back(key.is_none() ? 0 : n);
  for (size_t i = 0; i < n; ++i) {
    if (i + kAhead < n) {
      prefetch(i + kAhead);
      prefetch(n + i + kAhead);  // the gradient of the last step
    }
    PyObject* const found = PyObject_GetAttr(PyList_GET_ITEM(params.ptr(), i), grad);
    if (!found) throw py::error_already_set();
    PyList_SET_ITEM(lists[1].ptr(), i, found);
  }
  for (size_t i = 0; i < n; ++i) {
    if (i + 2 * kAhead < n) __builtin_prefetch(PyList_GET_ITEM(states.ptr(), i + 2 * kAhead));
    if (i + kAhead < n) prefetch_keys(PyList_GET_ITEM(states.ptr(), i + kAhead));
    for (size_t j = 0; j < keys.size(); ++j) {
      if (keys[j].is_none()) continue;
      PyObject* const found = PyDict_GetItemWithError(PyList_GET_ITEM(states.ptr(), i), keys[j].ptr());
      if (!found && PyErr_Occurred()) throw py::error_already_set();
      if (!found) return {};
      Py_INCREF(found);
      PyList_SET_ITEM(lists[j + 2].ptr(), i, found);
    }
  }
  return lists;
}

ChunkTable::Change ChunkTable::move_to(std::vector<uintptr_t> pointers, const py::sequence& names) {
  if (pointers == pointers_) return kSame;
  require_disjoint(pointers, names);
  pointers_ = std::move(pointers);
  return kMoved;
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

// Without the scratch, whose place only the whole table knows: any number but zero stands for it.
Rows ChunkTable::rows_of(int64_t tensor, int rows) const {
  const Entry& entry = entries_[tensor];
  const int64_t* sizes = shapes_.data() + entry.shape;
  const int64_t* strides = sizes + entry.ndim;
  if (entry.numel == 0 || rows == kNoRows || (rows != kTensorRows && entry.ndim < rows)) return {0, 0, 0, 0};
  if (rows == kTensorRows || entry.ndim == 0 || sizes[0] == 1) {
    return {1, entry.numel, entry.numel, entry.numel > kLocalRow};
  }
  const int64_t length = entry.numel / sizes[0];
  // Where rows have one element, the stride of dim 0 is that of one row, whatever the layout.
  return {sizes[0], strides[0], length, length != strides[0] || length > kLocalRow};
}

ChunkTable::Size ChunkTable::size(int64_t chunk_elements, int rows) const {
  Size size = {0, 0, 0, 0};
  int64_t scratch = 0;
  for (int64_t t = 0; t < tensors(); ++t) {
    const Rows r = rows_of(t, rows);
    const int64_t chunk = r.local() ? r.rows_per_chunk() * r.inner : chunk_elements;
    size.chunks += (entries_[t].numel + chunk - 1) / chunk;
    if (!r.scratch) continue;
    size.partials += (r.count * r.segments() + kGroup - 1) / kGroup;
    scratch += r.count * (r.segments() + 1) * kRowWords;
  }
  const int64_t lists = static_cast<int64_t>(is_mutated_.size());
  size.written = kTableHeader + tensors() * (kRecord + lists) + size.chunks + size.partials;
  size.words = size.written + scratch;
  return size;
}

void ChunkTable::write(int64_t* out, int64_t chunk_elements, int rows) const {
  const int64_t n = tensors(), lists = static_cast<int64_t>(is_mutated_.size());
  const Size whole = size(chunk_elements, rows);
  std::fill(out, out + kTableHeader + n * (kRecord + lists), 0);
  out[0] = n;
  out[1] = whole.chunks;
  out[2] = lists;
  out[3] = chunk_elements;
  out[5] = whole.partials;
  int64_t* record = out + kTableHeader;
  int64_t* chunk = record + n * (kRecord + lists);
  int64_t* partial = chunk + whole.chunks;
  int64_t scratch = whole.written;
  for (int64_t t = 0; t < n; ++t, record += kRecord + lists) {
    const Rows r = rows_of(t, rows);
    record[0] = entries_[t].numel;
    record[1] = r.count;
    record[2] = r.inner;
    for (int l = 0; l < lists_; ++l) record[kRecord + present_[l]] = static_cast<int64_t>(pointers_[l * n + t]);
    const int64_t elements = r.local() ? r.rows_per_chunk() * r.inner : chunk_elements;
    for (int64_t c = 0; c * elements < entries_[t].numel; ++c) *chunk++ = (t << 32) | c;
    if (!r.scratch) continue;
    record[3] = scratch;
    scratch += r.count * (r.segments() + 1) * kRowWords;
    for (int64_t g = 0; g * kGroup < r.count * r.segments(); ++g) *partial++ = (t << 32) | g;
  }
}

}  // namespace fastcurv
