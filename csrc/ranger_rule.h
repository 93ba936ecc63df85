// The arithmetic of Ranger.
//
//   g' = s g - mean of s g over its row    s = -1 if maximize else 1, over grad_scale; a row only with centralisation
//   m  = beta1 m + (1 - beta1) g',  v = beta2 v + (1 - beta2) g'^2
//   p  = d p - c m / (sqrt(v) + eps)       c = lr r sqrt(1 - beta2^t) / (1 - beta1^t), d = 1 - lr weight_decay
//   p  = d p - c m                         c = lr / (1 - beta1^t), where RAdam's average is too short
//   slow = slow + alpha (p - slow), p = slow    on every k-th step
//
// with d = 1 - c weight_decay for scaled decay. Source: Wright (2019), versions 20.4.11 and 2020.9.4 (scaled decay);
// spec first_order 3.1 items 2, 6, 7 and 3.3. Bytes per element with float32 storage: 28, and 8 more on every k-th
// step; 15 flops.
#pragma once
#include "rule.h"
#include "schedule.h"

namespace fastcurv {

struct RangerOp {
  enum List { kParam, kGrad, kExpAvg, kExpAvgSq, kSlowBuffer, kStep, kLists };
  enum Scalar { kLr, kBeta1, kBeta2, kEps, kWeightDecay, kAlpha, kNSmaThreshold };
  enum Option { kK, kUseGc, kGcConvOnly, kScaledWeightDecay, kMaximize };
};

template <typename Param, typename State, int variant>
struct RangerRule : RangerOp, SteppingRule<Param, State, RangerOp::kStep> {
  using Base = SteppingRule<Param, State, RangerOp::kStep>;
  using typename Base::T;
  static constexpr unsigned int kParamLists = set_of(kParam, kGrad), kExactLists = set_of(kSlowBuffer);
  static constexpr unsigned int kWrites = set_of(kParam, kExpAvg, kExpAvgSq), kReads = kWrites | set_of(kGrad);
  static constexpr unsigned int kRare = set_of(kSlowBuffer);
  static constexpr int kSums = 1;
  static constexpr unsigned int kFirstReads = set_of(kGrad), kFirstWrites = 0;

  struct Coefficients {
    T grad_factor, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, eps, alpha, is_rectified;
    bool synchronises;
  };
  struct Row {
    T mean;
  };

  static FC_INLINE Coefficients coefficients(const Args& args, const Table& table, long long tensor) {
    const long long step = Base::step(table, tensor);
    const double lr = args.scalar(kLr), beta1 = args.scalar(kBeta1), beta2 = args.scalar(kBeta2);
    const Rectification r = rectification(beta2, step);
    Coefficients c;
    const bool is_rectified = r.length > args.scalar(kNSmaThreshold);
    const double rectified = is_rectified ? r.factor * square_root(one_minus_power(beta2, step)) : 1.0;
    const double step_size = lr * rectified / one_minus_power(beta1, step);
    c.grad_factor = static_cast<T>(args.grad_factor(args.options[kMaximize] != 0));
    c.decay = static_cast<T>(1.0 - (args.options[kScaledWeightDecay] ? step_size : lr) * args.scalar(kWeightDecay));
    c.beta1 = static_cast<T>(beta1);
    c.one_minus_beta1 = static_cast<T>(1.0 - beta1);
    c.beta2 = static_cast<T>(beta2);
    c.one_minus_beta2 = static_cast<T>(1.0 - beta2);
    c.step_size = static_cast<T>(step_size);
    c.eps = static_cast<T>(args.scalar(kEps));
    c.alpha = static_cast<T>(args.scalar(kAlpha));
    c.is_rectified = static_cast<T>(is_rectified);
    c.synchronises = step % args.options[kK] == 0;
    return c;
  }

  static FC_INLINE void first(const Coefficients& c, T* x, double* terms) {
    terms[0] = static_cast<double>(x[kGrad] * c.grad_factor);
  }
  static FC_INLINE Row row(const Coefficients&, const double* sums, long long length, const Table&, long long,
                           long long) {
    return {static_cast<T>(sums[0] / static_cast<double>(length))};
  }
  static FC_INLINE Row no_row(const Coefficients&) { return {T(0)}; }

  static FC_INLINE void element(const Coefficients& c, const Row& row, T* x) {
    const T g = x[kGrad] * c.grad_factor - row.mean;
    x[kExpAvg] = c.beta1 * x[kExpAvg] + c.one_minus_beta1 * g;
    x[kExpAvgSq] = c.beta2 * x[kExpAvgSq] + c.one_minus_beta2 * (g * g);
    const T denominator = c.is_rectified != T(0) ? square_root(x[kExpAvgSq]) + c.eps : T(1);
    x[kParam] = c.decay * x[kParam] - c.step_size * (x[kExpAvg] / denominator);
  }

  static FC_INLINE bool is_rare(const Coefficients& c) { return c.synchronises; }
  static FC_INLINE void rare(const Coefficients& c, T* x) {
    x[kSlowBuffer] = x[kSlowBuffer] + c.alpha * (x[kParam] - x[kSlowBuffer]);
    x[kParam] = x[kSlowBuffer];
  }
};

}  // namespace fastcurv
