// Scalars of a step that several rules need, in double: the same bits wherever they are computed.
#pragma once
#include "numeric.h"

namespace fastcurv {

// RAdam (Liu et al., 2020, section 4; spec first_order 3.1 item 2): the length of the approximated simple moving
// average, and the factor of the step, which is 1 where it is not defined.
struct Rectification {
  double length, factor;
};

FC_INLINE Rectification rectification(double beta2, long long step) {
  const double longest = 2.0 / (1.0 - beta2) - 1.0;
  const double correction = one_minus_power(beta2, step);
  const double length = longest - 2.0 * static_cast<double>(step) * (1.0 - correction) / correction;
  if (!(length > 4.0)) return {length, 1.0};
  const double ratio = (length - 4.0) * (length - 2.0) * longest / ((longest - 4.0) * (longest - 2.0) * length);
  return {length, square_root(ratio)};
}

}  // namespace fastcurv
