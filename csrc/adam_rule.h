// The arithmetic of the Adam family.
//
//   g' = s g + l p              s = -1 if maximize else 1, over grad_scale;  l = weight_decay if not decoupled else 0
//   m  = beta1 m + (1 - beta1) g'
//   v  = beta2 v + (1 - beta2) g'^2, or with Yogi v - (1 - beta2) sign(v - g'^2) g'^2
//   u  = v, or max(u, v) with AMSGrad
//   p  = d p - c m / (sqrt(u) + e)             d = 1 - lr weight_decay if decoupled else 1
//   c  = lr sqrt(1 - beta2^t) / (1 - beta1^t)  e = eps sqrt(1 - beta2^t)
//
// which is Kingma and Ba's m_hat / (sqrt(v_hat) + eps) with sqrt(1 - beta2^t) multiplied through: one division and one
// square root per element, both IEEE. RAdam multiplies c by its rectification, leaves eps as it is, and divides by 1 as
// long as it is not rectified. NAdam has c m + b g' above the same denominator. Source: spec first_order 1.1 with
// errata 3.1 items 1 to 4; Loshchilov and Hutter (2019) for the decoupled decay; Dozat (2016) for NAdam. Bytes per
// element with float32 storage: 28 (36 with AMSGrad); 13 flops.
#pragma once
#include "rule.h"
#include "schedule.h"

namespace fastcurv {

struct AdamOp {
  enum List { kParam, kGrad, kExpAvg, kExpAvgSq, kMaxExpAvgSq, kMuProduct, kStep, kLists };
  enum Scalar { kLr, kBeta1, kBeta2, kEps, kWeightDecay, kMuDecay };
  enum Option { kRule, kDecoupledWeightDecay, kMaximize };
  enum Variant { kAdam, kAmsgrad, kRadam, kNadam, kYogi };
};

template <typename Param, typename State, int variant>
struct AdamRule : AdamOp, SteppingRule<Param, State, AdamOp::kStep> {
  using Base = SteppingRule<Param, State, AdamOp::kStep>;
  using typename Base::Row;
  using typename Base::T;
  static constexpr unsigned int kParamLists = set_of(kParam, kGrad);
  static constexpr unsigned int kWrites =
      set_of(kParam, kExpAvg, kExpAvgSq) | (variant == kAmsgrad ? set_of(kMaxExpAvgSq) : 0);
  static constexpr unsigned int kReads = kWrites | set_of(kGrad);

  // Rounded once from double.
  struct Coefficients {
    T grad_factor, l2, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, eps;
    T grad_step_size;  // NAdam's b
    T is_rectified;    // RAdam
  };

  static FC_INLINE bool alike(const Table& table, long long a, long long b) {
    return Base::alike(table, a, b) &&
           (variant != kNadam || *table.pointer<float>(a, kMuProduct) == *table.pointer<float>(b, kMuProduct));
  }

  // NAdam's momentum at a step, and the product of all up to it, multiplied in float as torch does.
  static FC_INLINE double momentum(const Args& args, long long step) {
    return args.scalar(kBeta1) * (0.5 + 0.5 * one_minus_power(args.scalar(kMuDecay), step));
  }
  static FC_INLINE float momentum_product(const Args& args, const Table& table, long long tensor) {
    return *table.pointer<float>(tensor, kMuProduct) * static_cast<float>(momentum(args, Base::step(table, tensor)));
  }

  static FC_INLINE Coefficients coefficients(const Args& args, const Table& table, long long tensor) {
    const long long step = Base::step(table, tensor);
    const double lr = args.scalar(kLr), beta1 = args.scalar(kBeta1), beta2 = args.scalar(kBeta2);
    const double eps = args.scalar(kEps), weight_decay = args.scalar(kWeightDecay);
    const bool decoupled = args.options[kDecoupledWeightDecay] != 0;
    const double correction1 = one_minus_power(beta1, step);
    const double root2 = square_root(one_minus_power(beta2, step));
    Coefficients c;
    c.grad_factor = static_cast<T>(args.grad_factor(args.options[kMaximize] != 0));
    c.l2 = static_cast<T>(decoupled ? 0.0 : weight_decay);
    c.decay = static_cast<T>(decoupled ? 1.0 - lr * weight_decay : 1.0);
    c.beta1 = static_cast<T>(beta1);
    c.one_minus_beta1 = static_cast<T>(1.0 - beta1);
    c.beta2 = static_cast<T>(beta2);
    c.one_minus_beta2 = static_cast<T>(1.0 - beta2);
    c.step_size = static_cast<T>(lr * root2 / correction1);
    c.grad_step_size = T(0);
    c.eps = static_cast<T>(eps * root2);
    c.is_rectified = T(1);
    if (variant == kRadam) {
      const Rectification r = rectification(beta2, step);
      const bool is_rectified = r.length > 5.0;
      c.is_rectified = static_cast<T>(is_rectified);
      c.step_size = static_cast<T>(is_rectified ? lr * root2 * r.factor / correction1 : lr / correction1);
      c.eps = static_cast<T>(eps);
    }
    if (variant == kNadam) {
      const double mu = momentum(args, step), next = momentum(args, step + 1);
      const double product = static_cast<double>(momentum_product(args, table, tensor));
      c.step_size = static_cast<T>(lr * root2 * next / (1.0 - product * next));
      c.grad_step_size = static_cast<T>(lr * root2 * (1.0 - mu) / (1.0 - product));
    }
    return c;
  }

  static FC_INLINE void element(const Coefficients& c, const Row&, T* x) {
    T g = x[kGrad] * c.grad_factor;
    // Not `g + l2 * param` alone: with l2 = 0 and an infinite parameter that would be NaN.
    g = c.l2 != T(0) ? g + c.l2 * x[kParam] : g;
    x[kExpAvg] = c.beta1 * x[kExpAvg] + c.one_minus_beta1 * g;
    const T square = g * g;
    if (variant == kYogi) {
      const T v = x[kExpAvgSq];
      x[kExpAvgSq] = v - c.one_minus_beta2 * (v > square ? square : v < square ? -square : T(0) * square);
    } else {
      x[kExpAvgSq] = c.beta2 * x[kExpAvgSq] + c.one_minus_beta2 * square;
    }
    T second = x[kExpAvgSq];
    if (variant == kAmsgrad) second = x[kMaxExpAvgSq] = maximum(x[kMaxExpAvgSq], second);
    T denominator = square_root(second) + c.eps;
    if (variant == kRadam) denominator = c.is_rectified != T(0) ? denominator : T(1);
    if (variant == kNadam) {
      x[kParam] = c.decay * x[kParam] - (c.step_size * x[kExpAvg] + c.grad_step_size * g) / denominator;
    } else {
      x[kParam] = c.decay * x[kParam] - c.step_size * (x[kExpAvg] / denominator);
    }
  }

  static FC_INLINE void advance(const Args& args, const Table& table, long long tensor) {
    if (variant == kNadam) *table.pointer<float>(tensor, kMuProduct) = momentum_product(args, table, tensor);
    Base::advance(args, table, tensor);
  }
};

}  // namespace fastcurv
