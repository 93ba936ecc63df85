// The polar factors of a list of matrices whose smaller side stays in the cache, one thread to a matrix.
//
//   S = G G^T = V diag(lambda) V^T in double,  O = V diag(lambda^-1/2, or 0 where that counts as zero) V^T G
//
// then, where the smallest lambda kept has lost digits, O = (3/2 - O O^T / 2) O until it is orthonormal again. Source:
// spec osgd 2.7; Higham, Functions of Matrices, chapter 8.
#include <algorithm>
#include <limits>
#include <memory>
#include <vector>

#include "../fastcurv.h"
#include "each_matrix.h"
#include "eigen.h"
#include "products.h"
#include "simd.h"

namespace fastcurv {
namespace {

// What one thread needs: `small` is the largest smaller side.
struct Room {
  long long stride;
  std::unique_ptr<double[]> gram, factor, work, panel, product, values, squares;

  explicit Room(long long small)
      : stride(padded(small, kRotated)),
        gram(new double[stride * stride]),
        factor(new double[stride * stride]),
        work(new double[eigen_work(stride, stride)]),
        panel(new double[stride * kPanel]),
        product(new double[stride * kPanel]),
        values(new double[stride]),
        squares(new double[stride]) {}
};

// factor = V diag(weights) V^T, where row k of `vectors` is the k-th column of V. Dead rows stay exactly zero.
FC_INLINE void compose(long long small, long long stride, const double* vectors, const double* weights,
                       const double* squares, double* scaled, double* factor) {
  std::fill(factor, factor + stride * stride, 0.0);
  for (long long k = 0; k < small; ++k) {
    for (long long j = 0; j < stride; ++j) scaled[j] = weights[k] * vectors[k * stride + j];
    if (weights[k] == 0.0) continue;
    for (long long i = 0; i < small; ++i) {
      if (squares[i] == 0.0) continue;
      const double left = vectors[k * stride + i];
      for (long long j = 0; j < small; ++j) factor[i * stride + j] += left * scaled[j];
    }
  }
}

struct Polar {
  static FC_INLINE void run(const Matrix* matrix, const Panels* given, Room* room) {
    const Matrix& m = *matrix;
    const Panels& panels = *given;
    const long long small = m.small(), stride = room->stride;
    double *const s = room->gram.get(), *const lambda = room->values.get();
    double* const squares = room->squares.get();
    double trace = 0.0;
    gram(panels, m, m.in, room->panel.get(), s, stride);
    for (long long i = 0; i < small; ++i) trace += squares[i] = s[i * stride + i];
    const bool finite = trace - trace == 0.0 && symmetric_eigen(small, stride, s, lambda, room->work.get());
    *m.info = finite ? 0 : kNotFinite;
    if (!finite || trace == 0.0) {
      if (finite) *m.info = static_cast<int>(small);
      panels.clear(m);
      return;
    }
    const double largest = *std::max_element(lambda, lambda + small);
    const double resolution = std::sqrt(static_cast<double>(m.large())) / (1 << 24);
    const double least = resolution * resolution * largest;
    double smallest = largest;
    for (long long k = 0; k < small; ++k) {
      const bool counts = lambda[k] > least;
      if (counts) smallest = std::min(smallest, lambda[k]);
      *m.info += !counts;
      lambda[k] = counts ? 1.0 / std::sqrt(lambda[k]) : 0.0;
    }
    double* const factor = room->factor.get();
    compose(small, stride, s, lambda, squares, room->work.get(), factor);
    const void* from = m.in;
    // Rounding of S moves the smallest eigenvalue by about this part of itself; a polishing step squares it.
    for (double loss = std::numeric_limits<double>::epsilon() * largest / smallest;; loss *= loss) {
      apply(panels, m, from, factor, stride, room->panel.get(), room->product.get(), m.out);
      if (!(loss > kPolished)) break;
      from = m.out;
      gram(panels, m, from, room->panel.get(), s, stride);
      for (long long i = 0; i < small; ++i) {
        for (long long j = 0; j < stride; ++j) factor[i * stride + j] = (i == j ? 1.5 : 0.0) - 0.5 * s[i * stride + j];
      }
    }
  }

 private:
  static constexpr double kPolished = 1e-7;
};

}  // namespace

void polar_cpu(const std::vector<Matrix>& matrices, Dtype dtype) {
  const Panels panels = Panels::of(dtype);
  const auto function = Clones<Polar>::select<const Matrix*, const Panels*, Room*>();
  long long small = 0;
  for (const Matrix& m : matrices) small = std::max(small, m.small());
  for_each_matrix(
      matrices, [](const Matrix& m) { return m.small() * m.small() * (3 * m.large() + 12 * m.small()); },
      [&] { return Room(small); }, [&](const Matrix& m, Room& room) { function(&m, &panels, &room); });
}

}  // namespace fastcurv
