// The arithmetic of LARS.
//
//   g' = q (s g + weight_decay p)    s = -1 if maximize else 1, over grad_scale
//   q  = trust |p| / (|s g| + weight_decay |p| + eps), or 1 where |p| or |g| is 0 or the tensor is no row
//   b  = momentum b + g'
//   p  = p - lr b, or p - lr (g' + momentum b) with Nesterov
//
// Source: You, Gitman and Ginsburg (2017), Algorithm 1, with the learning rate outside the momentum. Bytes per element
// with float32 storage: 20, or 28 where a tensor does not stay in the cache; 11 flops.
#pragma once
#include "rule.h"

namespace fastcurv {

struct LarsOp {
  enum List { kParam, kGrad, kMomentumBuffer, kLists };
  enum Scalar { kLr, kMomentum, kWeightDecay, kTrustCoefficient, kEps };
  enum Option { kNesterov, kAdaptive, kMaximize };
};

template <typename Param, typename State, int variant>
struct LarsRule : LarsOp, ElementRule<Param, State> {
  using Base = ElementRule<Param, State>;
  using typename Base::T;
  static constexpr unsigned int kParamLists = set_of(kParam, kGrad);
  static constexpr unsigned int kWrites = set_of(kParam, kMomentumBuffer), kReads = kWrites | set_of(kGrad);
  static constexpr int kSums = 2;
  static constexpr bool kRowIsTensor = true;
  static constexpr unsigned int kFirstReads = set_of(kParam, kGrad), kFirstWrites = 0;

  struct Coefficients {
    T grad_factor, l2, momentum, lr, nesterov;
    double weight_decay, trust_coefficient, eps;
  };
  using Row = Factored<T>;  // the ratio

  static FC_INLINE Coefficients coefficients(const Args& args, const Table&, long long) {
    Coefficients c;
    c.grad_factor = static_cast<T>(args.grad_factor(args.options[kMaximize] != 0));
    c.weight_decay = args.scalar(kWeightDecay);
    c.l2 = static_cast<T>(c.weight_decay);
    c.momentum = static_cast<T>(args.scalar(kMomentum));
    c.lr = static_cast<T>(args.scalar(kLr));
    c.trust_coefficient = args.scalar(kTrustCoefficient);
    c.eps = args.scalar(kEps);
    c.nesterov = static_cast<T>(args.options[kNesterov] != 0);
    return c;
  }

  static FC_INLINE void first(const Coefficients& c, T* x, double* terms) {
    const double p = static_cast<double>(x[kParam]), g = static_cast<double>(x[kGrad] * c.grad_factor);
    terms[0] = p * p;
    terms[1] = g * g;
  }
  static FC_INLINE Row row(const Coefficients& c, const double* sums, long long, const Table&, long long, long long) {
    const double norm = square_root(sums[0]), grad_norm = square_root(sums[1]);
    const double ratio = c.trust_coefficient * norm / (grad_norm + c.weight_decay * norm + c.eps);
    return factored(norm == 0.0 || grad_norm == 0.0 ? 1.0 : ratio, T());
  }
  static FC_INLINE Row no_row(const Coefficients&) { return {T(1), T(1)}; }

  static FC_INLINE void element(const Coefficients& c, const Row& row, T* x) {
    T g = x[kGrad] * c.grad_factor;
    g = row.times(c.l2 != T(0) ? g + c.l2 * x[kParam] : g);
    x[kMomentumBuffer] = c.momentum * x[kMomentumBuffer] + g;
    const T step = c.nesterov != T(0) ? g + c.momentum * x[kMomentumBuffer] : x[kMomentumBuffer];
    x[kParam] = x[kParam] - c.lr * step;
  }
};

}  // namespace fastcurv
