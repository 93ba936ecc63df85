// Newton-Schulz steps on a list of matrices whose smaller side stays in the cache, one thread to a matrix.
//
// In double, and on the Gram matrix: with R = X X^T a step is X -> P X, P = a + b R + c R^2, and R -> P R P, where all
// are polynomials of the first R and commute. The product of all P then goes over the matrix once. In float this would
// lose singular values below 1e-4; in double it is closer to exact steps than any chain of float products.
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "../fastcurv.h"
#include "each_matrix.h"
#include "products.h"
#include "simd.h"

namespace fastcurv {
namespace {

// What one thread needs: `small` is the largest smaller side. Square ones have rows of kPanel, as panels do.
struct Room {
  long long small;
  std::unique_ptr<double[]> gram, square, step, whole, panel, product;

  explicit Room(long long small)
      : small(padded(small, 4)),
        gram(new double[this->small * kPanel]),
        square(new double[this->small * kPanel]),
        step(new double[this->small * kPanel]),
        whole(new double[this->small * kPanel]),
        panel(new double[this->small * kPanel]),
        product(new double[this->small * kPanel]) {}
};

struct NewtonSchulz {
  static FC_INLINE void run(const Matrix* matrix, const Panels* given, const Step* steps, long long count,
                            long long spectral, double eps, Room* room) {
    const Matrix& m = *matrix;
    const Panels& panels = *given;
    const long long small = m.small();
    double *const r = room->gram.get(), *const p = room->step.get();
    gram(panels, m, m.in, room->panel.get(), r, kPanel);
    double trace = 0.0;
    for (long long i = 0; i < small; ++i) trace += r[i * kPanel + i];
    *m.info = trace - trace == 0.0 ? 0 : kNotFinite;
    if (!(trace > 0.0) || *m.info) {
      if (spectral && trace == 0.0) *m.info = static_cast<int>(small);
      panels.clear(m);
      return;
    }
    if (!spectral) trace = std::max(trace, eps * eps);
    for (long long i = 0; i < small * kPanel; ++i) r[i] /= trace;
    const double sides = spectral ? static_cast<double>(m.large()) / static_cast<double>(spectral) : 1.0;
    const double largest = spectral ? largest_eigenvalue(small, r, *room) * sides : 1.0;
    for (long long i = 0; i < small * kPanel; ++i) r[i] /= largest;
    const double first = 1.0 / std::sqrt(trace * largest);
    std::unique_ptr<double[]>*whole = &room->whole, *next = &room->product;
    for (long long k = 0; k < count; ++k) {
      double* const square = room->square.get();
      multiply(small, r, kPanel, r, square, small);
      for (long long i = 0; i < small; ++i) {
        for (long long j = 0; j < kPanel; ++j) {
          const long long at = i * kPanel + j;
          p[at] = steps[k].b * r[at] + steps[k].c * square[at] + (i == j ? steps[k].a : 0.0);
        }
      }
      if (k == 0) {
        for (long long i = 0; i < small * kPanel; ++i) (*whole)[i] = first * p[i];
      } else {
        multiply(small, p, kPanel, whole->get(), next->get(), small);
        std::swap(whole, next);
      }
      if (k + 1 < count) {
        multiply(small, p, kPanel, r, square, small);
        multiply(small, p, kPanel, square, r, small);
      }
    }
    apply(panels, m, m.in, whole->get(), kPanel, room->panel.get(), next->get(), m.out);
    if (!spectral) return;
    double square = 0.0;
    for (long long begin = 0; begin < m.large(); begin += kPanel) {
      panels.load(&m, m.out, begin, room->panel.get());
      for (long long i = 0; i < small * kPanel; ++i) square += room->panel[i] * room->panel[i];
    }
    *m.info = static_cast<int>(small - std::llround(square));
  }

 private:
  // Of a matrix with trace one, from above: the trace of its 64th power, to the power 1/64, is too large by a factor of
  // small^(1/64) at the most, and by less the fewer eigenvalues are near the largest.
  static FC_INLINE double largest_eigenvalue(long long small, const double* r, Room& room) {
    double *from = room.step.get(), *to = room.square.get(), log = 0.0;
    std::copy(r, r + small * kPanel, from);
    for (int power = 2; power <= 64; power *= 2) {
      multiply(small, from, kPanel, from, to, small);
      double trace = 0.0;
      for (long long i = 0; i < small; ++i) trace += to[i * kPanel + i];
      for (long long i = 0; i < small * kPanel; ++i) to[i] /= trace;
      log += std::log(trace) / power;
      std::swap(from, to);
    }
    return std::exp(log);
  }
};

}  // namespace

void newton_schulz_cpu(const std::vector<Matrix>& matrices, Dtype dtype, const std::vector<Step>& steps,
                       long long spectral, double eps) {
  const Panels panels = Panels::of(dtype);
  const auto function =
      Clones<NewtonSchulz>::select<const Matrix*, const Panels*, const Step*, long long, long long, double, Room*>();
  long long small = 0;
  for (const Matrix& m : matrices) small = std::max(small, m.small());
  const long long count = static_cast<long long>(steps.size());
  for_each_matrix(
      matrices, [&](const Matrix& m) { return m.small() * m.small() * (3 * m.large() + 8 * count * m.small()); },
      [&] { return Room(small); },
      [&](const Matrix& m, Room& room) { function(&m, &panels, steps.data(), count, spectral, eps, &room); });
}

}  // namespace fastcurv
