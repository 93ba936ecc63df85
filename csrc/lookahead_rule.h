// The slow update of Lookahead: slow <- slow + alpha (p - slow), p <- slow.
//
// Source: Zhang et al. (2019), Algorithm 1; spec first_order 3.1 item 6. Bytes per element with float32 storage: 16; 3
// flops.
#pragma once
#include "rule.h"

namespace fastcurv {

struct LookaheadOp {
  enum List { kParam, kSlowBuffer, kLists };
  enum Scalar { kAlpha };
};

template <typename Param, typename State, int variant>
struct LookaheadRule : LookaheadOp, ElementRule<Param, State> {
  using Base = ElementRule<Param, State>;
  using typename Base::Row;
  using typename Base::T;
  static constexpr unsigned int kParamLists = set_of(kParam), kExactLists = set_of(kSlowBuffer);
  static constexpr unsigned int kReads = set_of(kParam, kSlowBuffer), kWrites = kReads;

  struct Coefficients {
    T alpha;
  };

  static FC_INLINE Coefficients coefficients(const Args& args, const Table&, long long) {
    return {static_cast<T>(args.scalar(kAlpha))};
  }

  static FC_INLINE void element(const Coefficients& c, const Row&, T* x) {
    x[kSlowBuffer] = x[kSlowBuffer] + c.alpha * (x[kParam] - x[kSlowBuffer]);
    x[kParam] = x[kSlowBuffer];
  }
};

}  // namespace fastcurv
