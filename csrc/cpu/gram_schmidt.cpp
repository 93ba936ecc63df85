// Gram-Schmidt on the rows of a list of matrices that stay in the cache, one thread to a matrix.
//
// Panel by panel, each twice: its rows less their projections on all earlier rows, then one after another, each twice,
// less their projections on the earlier rows of the panel (block classical Gram-Schmidt with reorthogonalisation:
// Barlow and Smoktunowicz, 2013; "twice is enough": Giraud et al., 2005). About 4 m^2 n flops, most of them in products
// of blocks.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "../fastcurv.h"
#include "each_matrix.h"
#include "simd.h"

namespace fastcurv {
namespace {

constexpr long long kBlock = 4;       // rows whose products are formed together
constexpr long long kPanelRows = 16;  // rows of a panel; a multiple of kBlock
constexpr long long kColumns = 1024;  // columns of which blocks of rows stay in the cache

template <typename T, int bytes>
struct VectorOf;
// One by one: attributes of types that depend on a parameter are ignored.
#define VECTOR_OF(T, bytes)                                                             \
  template <>                                                                           \
  struct VectorOf<T, bytes> {                                                           \
    using type = T __attribute__((vector_size(bytes), aligned(alignof(T)), may_alias)); \
  }
VECTOR_OF(float, 64);
VECTOR_OF(float, 32);
VECTOR_OF(float, 16);
VECTOR_OF(float, 8);
VECTOR_OF(double, 64);
VECTOR_OF(double, 32);
VECTOR_OF(double, 16);
#undef VECTOR_OF
template <typename T, int bytes = 64>
using Vector = typename VectorOf<T, bytes>::type;
template <typename T>
constexpr long long kLane = 64 / sizeof(T);

template <typename T>
FC_INLINE const Vector<T>& vector_at(const T* from) {
  return *reinterpret_cast<const Vector<T>*>(from);
}

// The rows of a matrix in the type of the arithmetic, each with zeros up to `stride`.
template <typename T>
struct RowList {
  T* values;
  long long stride;

  FC_INLINE T* operator[](long long row) const { return values + row * stride; }
};

// The sum of the lanes of a vector, by halves.
template <typename T, int bytes = 64>
FC_INLINE T sum(const void* lanes) {
  if constexpr (bytes == 2 * sizeof(T)) {
    const T* const two = static_cast<const T*>(lanes);
    return two[0] + two[1];
  } else {
    using Half = Vector<T, bytes / 2>;
    const Half* const halves = static_cast<const Half*>(lanes);
    const Half total = halves[0] + halves[1];
    return sum<T, bytes / 2>(&total);
  }
}

template <typename T>
FC_INLINE double norm(const T* row, long long stride) {
  using Eight = Vector<T, 8 * sizeof(T)>;
  Vector<double> squares[2] = {};
  for (long long k = 0; k < stride; k += 16) {
    for (int v = 0; v < 2; ++v) {
      const auto x = __builtin_convertvector(*reinterpret_cast<const Eight*>(row + k + 8 * v), Vector<double>);
      squares[v] += x * x;
    }
  }
  const Vector<double> both = squares[0] + squares[1];
  return std::sqrt(sum<double>(&both));
}

// Rows p, p + 1, ... of a panel less their projections on all rows before p.
template <typename T>
FC_INLINE void project_panel(const RowList<T>& rows, long long p, long long end, T* products) {
  std::fill(products, products + p * kPanelRows, T(0));
  for (long long begin = 0; begin < rows.stride; begin += kColumns) {
    const long long last = std::min(rows.stride, begin + kColumns);
    for (long long j = 0; j < p; j += kBlock) {
      for (long long b = p; b < end; b += kBlock) {
        Vector<T> sums[kBlock][kBlock] = {};
        for (long long k = begin; k < last; k += kLane<T>) {
          Vector<T> left[kBlock], right[kBlock];
          for (int r = 0; r < kBlock; ++r) left[r] = vector_at(rows[b + r] + k);
          for (int q = 0; q < kBlock; ++q) right[q] = vector_at(rows[j + q] + k);
          for (int r = 0; r < kBlock; ++r) {
            for (int q = 0; q < kBlock; ++q) sums[r][q] += left[r] * right[q];
          }
        }
        for (int r = 0; r < kBlock; ++r) {
          for (int q = 0; q < kBlock; ++q) products[(j + q) * kPanelRows + b - p + r] += sum<T>(&sums[r][q]);
        }
      }
    }
  }
  // What is read of earlier rows stays in the cache for all rows of the panel.
  for (long long k = 0; k < rows.stride; k += 2 * kLane<T>) {
    for (long long b = p; b < end; b += kBlock) {
      Vector<T> left[kBlock][2];
      for (int r = 0; r < kBlock; ++r) {
        for (int v = 0; v < 2; ++v) left[r][v] = vector_at(rows[b + r] + k + v * kLane<T>);
      }
      for (long long j = 0; j < p; ++j) {
        const Vector<T> right[2] = {vector_at(rows[j] + k), vector_at(rows[j] + k + kLane<T>)};
        for (int r = 0; r < kBlock; ++r) {
          for (int v = 0; v < 2; ++v) left[r][v] -= products[j * kPanelRows + b - p + r] * right[v];
        }
      }
      for (int r = 0; r < kBlock; ++r) {
        for (int v = 0; v < 2; ++v) *reinterpret_cast<Vector<T>*>(rows[b + r] + k + v * kLane<T>) = left[r][v];
      }
    }
  }
}

// The same for one row, against rows of its own panel.
template <typename T>
FC_INLINE void project_row(const RowList<T>& rows, long long row, long long first) {
  T products[kPanelRows];
  for (long long j = first; j < row; j += kBlock) {  // the last products may be of rows that are not earlier
    Vector<T> sums[kBlock] = {};
    for (long long k = 0; k < rows.stride; k += kLane<T>) {
      const Vector<T> left = vector_at(rows[row] + k);
      for (int q = 0; q < kBlock; ++q) sums[q] += left * vector_at(rows[j + q] + k);
    }
    for (int q = 0; q < kBlock; ++q) products[j - first + q] = sum<T>(&sums[q]);
  }
  for (long long k = 0; k < rows.stride; k += kLane<T>) {
    Vector<T> left = vector_at(rows[row] + k);
    for (long long j = first; j < row; ++j) left -= products[j - first] * vector_at(rows[j] + k);
    *reinterpret_cast<Vector<T>*>(rows[row] + k) = left;
  }
}

// Divides a row by its length; makes it zero where that is zero.
template <typename T>
FC_INLINE void scale(const RowList<T>& rows, long long row, double length) {
  const T factor = static_cast<T>(length > 0.0 ? 1.0 / length : 0.0);
  for (long long k = 0; k < rows.stride; ++k) rows[row][k] *= factor;
}

// Rows are read and written through pointers, so that the arithmetic is compiled once for all storages.
template <typename Storage>
struct ReadRows {
  template <typename T>
  static FC_INLINE void run(const Matrix* m, T* values, long long stride) {
    const Storage* const in = static_cast<const Storage*>(m->in);
    for (long long i = 0; i < m->small(); ++i) {
      for (long long k = 0; k < m->large(); ++k) values[i * stride + k] = load(in[m->at(i, k)]);
    }
  }
};

template <typename Storage>
struct WriteRows {
  template <typename T>
  static FC_INLINE void run(const Matrix* m, const T* values, long long stride) {
    Storage* const out = static_cast<Storage*>(m->out);
    for (long long i = 0; i < m->small(); ++i) {
      for (long long k = 0; k < m->large(); ++k) store(out[m->at(i, k)], values[i * stride + k]);
    }
  }
};

template <typename T>
struct Copies {
  void (*read)(const Matrix*, T*, long long);
  void (*write)(const Matrix*, const T*, long long);
};

template <typename T>
struct GramSchmidt {
  static FC_INLINE void run(const Matrix* matrix, const Copies<T>* copies, double floor, T* values, T* products,
                            double* norms) {
    const Matrix& m = *matrix;
    const long long small = m.small(), large = m.large();
    const RowList<T> rows = {values, padded(large, 2 * kLane<T>)};
    // Rows in the last block of the last panel that there are not are zero.
    std::fill(values, values + padded(small, kBlock) * rows.stride, T(0));
    *m.info = 0;
    copies->read(&m, values, rows.stride);
    if (!scale_rows(m, rows, norms)) {
      *m.info = kNotFinite;
      std::fill(values, values + small * rows.stride, T(0));
      copies->write(&m, values, rows.stride);
      return;
    }
    const double zero =
        std::sqrt(static_cast<double>(std::max(large, kLeastLength))) * 0.5 * std::numeric_limits<T>::epsilon();
    for (long long p = 0; p < small; p += kPanelRows) {
      const long long end = std::min(small, p + kPanelRows);
      const int passes = p > 0 ? 2 : 1;
      for (int pass = 0; pass < passes; ++pass) {
        if (p > 0) project_panel(rows, p, end, products);
        for (long long r = p; r < end; ++r) {
          project_row(rows, r, p);
          double length = norm(rows[r], rows.stride);
          const bool counts = pass ? length > kRounding : length > zero && length * norms[r] > floor;
          scale(rows, r, counts ? length : 0.0);
          project_row(rows, r, p);
          length = norm(rows[r], rows.stride);
          if (!(length > kRounding)) length = 0.0;
          scale(rows, r, length);
          *m.info += pass + 1 == passes && length == 0.0;
        }
      }
    }
    copies->write(&m, values, rows.stride);
  }

 private:
  // Scales rows to length one: Gram-Schmidt does not see the difference. False if one is not finite.
  static FC_INLINE bool scale_rows(const Matrix& m, const RowList<T>& rows, double* norms) {
    for (long long i = 0; i < m.small(); ++i) {
      Vector<T> most = {}, nothing = {};
      for (long long k = 0; k < rows.stride; k += kLane<T>) {
        const Vector<T> x = vector_at(rows[i] + k), size = x < T(0) ? -x : x;
        most = size > most ? size : most;
        nothing += T(0) * x;
      }
      if (sum<T>(&nothing) != T(0)) return false;
      T largest = T(0);
      for (long long k = 0; k < kLane<T>; ++k) largest = std::max(largest, most[k]);
      // Twice, so that no square overflows or vanishes.
      for (long long k = 0; k < rows.stride && largest > T(0); ++k) rows[i][k] /= largest;
      const double length = norm(rows[i], rows.stride);
      norms[i] = length * static_cast<double>(largest);
      scale(rows, i, length);
    }
    return true;
  }
};

template <typename Storage>
void run_list(const std::vector<Matrix>& matrices, double floor) {
  using T = typename Compute<Storage>::type;
  struct Room {
    std::unique_ptr<T[]> values, products;
    std::unique_ptr<double[]> norms;
  };
  const Copies<T> copies = {Clones<ReadRows<Storage>>::template select<const Matrix*, T*, long long>(),
                            Clones<WriteRows<Storage>>::template select<const Matrix*, const T*, long long>()};
  const auto function =
      Clones<GramSchmidt<T>>::template select<const Matrix*, const Copies<T>*, double, T*, T*, double*>();
  long long small = 0, most = 0;
  for (const Matrix& m : matrices) {
    small = std::max(small, m.small());
    most = std::max(most, padded(m.small(), kBlock) * padded(m.large(), 2 * kLane<T>));
  }
  for_each_matrix(
      matrices, [](const Matrix& m) { return 4 * m.small() * m.small() * m.large(); },
      [&] {
        return Room{std::unique_ptr<T[]>(new T[most]), std::unique_ptr<T[]>(new T[small * kPanelRows]),
                    std::unique_ptr<double[]>(new double[small])};
      },
      [&](const Matrix& m, Room& room) {
        function(&m, &copies, floor, room.values.get(), room.products.get(), room.norms.get());
      });
}

}  // namespace

void gram_schmidt_cpu(const std::vector<Matrix>& matrices, Dtype dtype, double floor) {
  switch (dtype) {
    case Dtype::float32: return run_list<float>(matrices, floor);
    case Dtype::float64: return run_list<double>(matrices, floor);
    case Dtype::bfloat16: return run_list<bfloat16>(matrices, floor);
    case Dtype::float16: return run_list<float16>(matrices, floor);
  }
}

}  // namespace fastcurv
