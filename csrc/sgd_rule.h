// The arithmetic of stochastic gradient descent.
//
//   g' = s g + weight_decay p    s = -1 if maximize else 1, over grad_scale
//   b  = momentum b + (1 - dampening) g', or g' on the first step
//   p  = p - lr b, or p - lr (g' + momentum b) with Nesterov, or p - lr g' without momentum
//
// Source: Sutskever et al. (2013), equations 1 to 4, in torch's form; spec first_order 1.1. Bytes per element with
// float32 storage: 20, or 12 without momentum; 4 flops.
#pragma once
#include "rule.h"

namespace fastcurv {

struct SgdOp {
  enum List { kParam, kGrad, kMomentumBuffer, kLists };
  enum Scalar { kLr, kMomentum, kDampening, kWeightDecay };
  enum Option { kNesterov, kIsFirstStep, kMaximize };
  enum Variant { kPlain, kWithMomentum };
};

template <typename Param, typename State, int variant>
struct SgdRule : SgdOp, ElementRule<Param, State> {
  using Base = ElementRule<Param, State>;
  using typename Base::Row;
  using typename Base::T;
  static constexpr unsigned int kParamLists = set_of(kParam, kGrad);
  static constexpr unsigned int kWrites = set_of(kParam) | (variant == kWithMomentum ? set_of(kMomentumBuffer) : 0);
  static constexpr unsigned int kReads = kWrites | set_of(kGrad);

  struct Coefficients {
    T grad_factor, l2, momentum, one_minus_dampening, lr, nesterov, is_first_step;
  };

  static FC_INLINE Coefficients coefficients(const Args& args, const Table&, long long) {
    Coefficients c;
    c.grad_factor = static_cast<T>(args.grad_factor(args.options[kMaximize] != 0));
    c.l2 = static_cast<T>(args.scalar(kWeightDecay));
    c.momentum = static_cast<T>(args.scalar(kMomentum));
    c.one_minus_dampening = static_cast<T>(1.0 - args.scalar(kDampening));
    c.lr = static_cast<T>(args.scalar(kLr));
    c.nesterov = static_cast<T>(args.options[kNesterov] != 0);
    c.is_first_step = static_cast<T>(args.options[kIsFirstStep] != 0);
    return c;
  }

  static FC_INLINE void element(const Coefficients& c, const Row&, T* x) {
    T g = x[kGrad] * c.grad_factor;
    g = c.l2 != T(0) ? g + c.l2 * x[kParam] : g;
    if (variant == kWithMomentum) {
      const T b = c.momentum * x[kMomentumBuffer] + c.one_minus_dampening * g;
      x[kMomentumBuffer] = c.is_first_step != T(0) ? g : b;
      g = c.nesterov != T(0) ? g + c.momentum * x[kMomentumBuffer] : x[kMomentumBuffer];
    }
    x[kParam] = x[kParam] - c.lr * g;
  }
};

}  // namespace fastcurv
