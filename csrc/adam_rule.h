// Adam's arithmetic, once, for cpu/adam.cpp and cuda/adam.cuh.
//
//   g' = s g + l p              s = -1 if maximize else 1, over grad_scale;  l = weight_decay if not decoupled else 0
//   m  = beta1 m + (1 - beta1) g'
//   v  = beta2 v + (1 - beta2) g'^2            u = v, or max(u, v) with AMSGrad
//   p  = d p - c m / (sqrt(u) + e)             d = 1 - lr weight_decay if decoupled else 1
//   c  = lr sqrt(1 - beta2^t) / (1 - beta1^t)  e = eps sqrt(1 - beta2^t)
//
// which is Kingma and Ba's m_hat / (sqrt(v_hat) + eps) with sqrt(1 - beta2^t) multiplied through: one division and one
// square root per element, both IEEE. Source: spec first_order 1.1 with errata 3.1 items 1 and 3; Loshchilov and Hutter
// (2019) for the decoupled decay. Bytes per element with float32 storage: 28 (36 with AMSGrad); 13 flops.
#pragma once
#include "table.h"

namespace fastcurv {

// Where each list stands in the table.
enum AdamList { kParam = 0, kGrad = 1, kExpAvg = 2, kExpAvgSq = 3, kMaxExpAvgSq = 4, kStep = 5, kAdamLists = 6 };

// What the kernel does with the second moment: the only part that changes which memory an element touches.
enum class SecondMoment : int { adam = 0, amsgrad = 1 };

constexpr Launch kAdamLaunch = {3, 256};

struct AdamArgs {
  long long* table;
  Scalar lr, beta1, beta2, eps, weight_decay;
  const float* grad_scale;  // null: 1
  const float* found_inf;   // null: 0; nonzero: nothing is written
  int decoupled_weight_decay;
  int maximize;
};

struct AdamHyper {
  double lr, beta1, beta2, eps, weight_decay, grad_factor;
  bool decoupled_weight_decay;
};

FC_INLINE bool adam_skips(const AdamArgs& args) { return args.found_inf && *args.found_inf != 0.0f; }

FC_INLINE AdamHyper adam_hyper(const AdamArgs& args) {
  AdamHyper h;
  h.lr = args.lr.get();
  h.beta1 = args.beta1.get();
  h.beta2 = args.beta2.get();
  h.eps = args.eps.get();
  h.weight_decay = args.weight_decay.get();
  h.grad_factor = (args.maximize ? -1.0 : 1.0) / (args.grad_scale ? static_cast<double>(*args.grad_scale) : 1.0);
  h.decoupled_weight_decay = args.decoupled_weight_decay != 0;
  return h;
}

// Everything the element loop needs, rounded once from double to the arithmetic type T.
template <typename T>
struct AdamCoefficients {
  T grad_factor, l2, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, eps;
};

template <typename T>
FC_INLINE AdamCoefficients<T> adam_coefficients(const AdamHyper& h, long long step) {
  const double correction1 = one_minus_power(h.beta1, step);
  const double root2 = square_root(one_minus_power(h.beta2, step));
  AdamCoefficients<T> c;
  c.grad_factor = static_cast<T>(h.grad_factor);
  c.l2 = static_cast<T>(h.decoupled_weight_decay ? 0.0 : h.weight_decay);
  c.decay = static_cast<T>(h.decoupled_weight_decay ? 1.0 - h.lr * h.weight_decay : 1.0);
  c.beta1 = static_cast<T>(h.beta1);
  c.one_minus_beta1 = static_cast<T>(1.0 - h.beta1);
  c.beta2 = static_cast<T>(h.beta2);
  c.one_minus_beta2 = static_cast<T>(1.0 - h.beta2);
  c.step_size = static_cast<T>(h.lr * root2 / correction1);
  c.eps = static_cast<T>(h.eps * root2);
  return c;
}

template <SecondMoment rule, typename T>
FC_INLINE void adam_element(const AdamCoefficients<T>& c, T& param, T grad, T& exp_avg, T& exp_avg_sq,
                            T& max_exp_avg_sq) {
  T g = grad * c.grad_factor;
  // Not `g + l2 * param` alone: with l2 = 0 and an infinite parameter that would be NaN.
  g = c.l2 != T(0) ? g + c.l2 * param : g;
  exp_avg = c.beta1 * exp_avg + c.one_minus_beta1 * g;
  exp_avg_sq = c.beta2 * exp_avg_sq + c.one_minus_beta2 * (g * g);
  T second = exp_avg_sq;
  if (rule == SecondMoment::amsgrad) {
    max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq);
    second = max_exp_avg_sq;
  }
  param = c.decay * param - c.step_size * (exp_avg / (square_root(second) + c.eps));
}

}  // namespace fastcurv
