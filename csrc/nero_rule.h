// The arithmetic of Nero. For each row, that is neuron, with weights w, gradient g and average s:
//
//   s = beta s + (1 - beta) |g|^2
//   w = w - r g                     r = lr scale / sqrt(s / (1 - beta^t)), or 0 where s is 0
//   w = (w - mean) / |w - mean|     with constraints, in rows of two or more elements
//
// w - r g is linear in what is known of the row, so that its mean and norm follow from five sums over w and g: a row is
// gone through twice, not four times. The sums are double: in float64 the norm is off by (|w| / |w - mean|)^2
// roundings, which the constraints keep at one or two. Source: Liu, Bernstein et al. (2021), Algorithm 1; spec nero 1.5
// and 3. Bytes per element with float32 storage: 12, or 20 where a row does not stay in the cache; 22 flops.
#pragma once
#include "rule.h"

namespace fastcurv {

struct NeroOp {
  enum List { kParam, kGrad, kRowExpAvgSq, kScale, kStep, kLists };
  enum Scalar { kLr, kBeta };
  enum Option { kConstraints, kMaximize };
};

template <typename Param, typename State, int variant>
struct NeroRule : NeroOp, SteppingRule<Param, State, NeroOp::kStep> {
  using Base = SteppingRule<Param, State, NeroOp::kStep>;
  using typename Base::T;
  static constexpr unsigned int kParamLists = set_of(kParam, kGrad);
  static constexpr unsigned int kReads = set_of(kParam, kGrad), kWrites = set_of(kParam);
  static constexpr int kSums = 5;
  static constexpr unsigned int kFirstReads = set_of(kParam, kGrad), kFirstWrites = 0;

  struct Coefficients {
    T grad_factor;
    double lr, beta, correction;
    bool constraints;
  };
  // An element is updated in double and rounded once: where a row's weights are nearly equal, its norm would not be
  // that of weights which had been rounded in between.
  using RowValue = double;
  struct Row {
    double rate, mean, inverse_norm;
  };

  static FC_INLINE Coefficients coefficients(const Args& args, const Table& table, long long tensor) {
    Coefficients c;
    c.grad_factor = static_cast<T>(args.grad_factor(args.options[kMaximize] != 0));
    c.lr = args.scalar(kLr);
    c.beta = args.scalar(kBeta);
    c.correction = one_minus_power(c.beta, Base::step(table, tensor));
    c.constraints = args.options[kConstraints] != 0;
    return c;
  }

  static FC_INLINE void first(const Coefficients& c, T* x, double* terms) {
    const double w = static_cast<double>(x[kParam]), g = static_cast<double>(x[kGrad] * c.grad_factor);
    terms[0] = w;
    terms[1] = g;
    terms[2] = w * w;
    terms[3] = w * g;
    terms[4] = g * g;
  }
  static FC_INLINE Row row(const Coefficients& c, const double* sums, long long length, const Table& table,
                           long long tensor, long long row) {
    T* average = table.pointer<T>(tensor, kRowExpAvgSq) + row;
    const double s = c.beta * static_cast<double>(*average) + (1.0 - c.beta) * sums[4];
    *average = static_cast<T>(s);
    const double scale = static_cast<double>(*table.pointer<T>(tensor, kScale));
    const double norm = square_root(s / c.correction);
    Row out = {norm == 0.0 ? 0.0 : c.lr * scale / norm, 0.0, 1.0};
    if (!c.constraints || length == 1) return out;
    const double n = static_cast<double>(length);
    out.mean = (sums[0] - out.rate * sums[1]) / n;
    // The squares of the gradients of a row that stays may be beyond double.
    const double square = out.rate == 0.0 ? sums[2] : sums[2] - out.rate * (2.0 * sums[3] - out.rate * sums[4]);
    const double centred = square - n * out.mean * out.mean;
    // Weights that are equal in their first 23 bits have no direction but that of their rounding: they become zero.
    out.inverse_norm = centred <= kAlike * square ? 0.0 : 1.0 / square_root(centred);
    return out;
  }
  static FC_INLINE Row no_row(const Coefficients&) { return {0.0, 0.0, 1.0}; }

  static FC_INLINE void element(const Coefficients& c, const Row& row, T* x) {
    const double w = static_cast<double>(x[kParam]), g = static_cast<double>(x[kGrad] * c.grad_factor);
    x[kParam] = static_cast<T>((w - row.rate * g - row.mean) * row.inverse_norm);
  }

 private:
  static constexpr double kAlike = 1.0 / (1ll << 46);
};

}  // namespace fastcurv
