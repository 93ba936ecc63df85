// The arithmetic of LAMB.
//
//   m = beta1 m + (1 - beta1) s g,  v = beta2 v + (1 - beta2) (s g)^2    s = -1 if maximize else 1, over grad_scale
//   u = c m / (sqrt(v) + e) + weight_decay p    c = sqrt(1 - beta2^t) / (1 - beta1^t), e = eps sqrt(1 - beta2^t)
//   p = p - lr q u                              q = |p| / |u|, or 1 where one is 0 or the tensor is no row
//
// The moments are written when the norms are taken, and u is computed again from them. Source: You et al. (2020),
// Algorithm 2. Bytes per element with float32 storage: 28, or 40 where a tensor does not stay in the cache; 24 flops.
#pragma once
#include "rule.h"

namespace fastcurv {

struct LambOp {
  enum List { kParam, kGrad, kExpAvg, kExpAvgSq, kStep, kLists };
  enum Scalar { kLr, kBeta1, kBeta2, kEps, kWeightDecay };
  enum Option { kAdaptive, kMaximize };
};

template <typename Param, typename State, int variant>
struct LambRule : LambOp, SteppingRule<Param, State, LambOp::kStep> {
  using Base = SteppingRule<Param, State, LambOp::kStep>;
  using typename Base::T;
  static constexpr unsigned int kParamLists = set_of(kParam, kGrad);
  static constexpr unsigned int kReads = set_of(kParam, kExpAvg, kExpAvgSq), kWrites = set_of(kParam);
  static constexpr int kSums = 2;
  static constexpr bool kRowIsTensor = true;
  static constexpr unsigned int kFirstReads = kReads | set_of(kGrad), kFirstWrites = set_of(kExpAvg, kExpAvgSq);

  struct Coefficients {
    T grad_factor, weight_decay, beta1, one_minus_beta1, beta2, one_minus_beta2, correction, eps;
    double lr;
  };
  using Row = Factored<T>;  // the step size

  static FC_INLINE Coefficients coefficients(const Args& args, const Table& table, long long tensor) {
    const long long step = Base::step(table, tensor);
    const double beta1 = args.scalar(kBeta1), beta2 = args.scalar(kBeta2);
    const double root2 = square_root(one_minus_power(beta2, step));
    Coefficients c;
    c.grad_factor = static_cast<T>(args.grad_factor(args.options[kMaximize] != 0));
    c.weight_decay = static_cast<T>(args.scalar(kWeightDecay));
    c.beta1 = static_cast<T>(beta1);
    c.one_minus_beta1 = static_cast<T>(1.0 - beta1);
    c.beta2 = static_cast<T>(beta2);
    c.one_minus_beta2 = static_cast<T>(1.0 - beta2);
    c.correction = static_cast<T>(root2 / one_minus_power(beta1, step));
    c.eps = static_cast<T>(args.scalar(kEps) * root2);
    c.lr = args.scalar(kLr);
    return c;
  }

  static FC_INLINE T direction(const Coefficients& c, const T* x) {
    const T u = c.correction * (x[kExpAvg] / (square_root(x[kExpAvgSq]) + c.eps));
    return c.weight_decay != T(0) ? u + c.weight_decay * x[kParam] : u;
  }

  static FC_INLINE void first(const Coefficients& c, T* x, double* terms) {
    const T g = x[kGrad] * c.grad_factor;
    x[kExpAvg] = stored<State>(c.beta1 * x[kExpAvg] + c.one_minus_beta1 * g);
    x[kExpAvgSq] = stored<State>(c.beta2 * x[kExpAvgSq] + c.one_minus_beta2 * (g * g));
    const double p = static_cast<double>(x[kParam]), u = static_cast<double>(direction(c, x));
    terms[0] = p * p;
    terms[1] = u * u;
  }
  static FC_INLINE Row row(const Coefficients& c, const double* sums, long long, const Table&, long long, long long) {
    const double norm = square_root(sums[0]), update_norm = square_root(sums[1]);
    return factored(norm == 0.0 || update_norm == 0.0 ? c.lr : c.lr * (norm / update_norm), T());
  }
  static FC_INLINE Row no_row(const Coefficients& c) { return factored(c.lr, T()); }

  static FC_INLINE void element(const Coefficients& c, const Row& row, T* x) {
    x[kParam] = x[kParam] - row.times(direction(c, x));
  }
};

}  // namespace fastcurv
