// Stochastic gradient descent over a list of tensors: see ../sgd_rule.h for the formula.
#include "../fastcurv.h"
#include "../sgd_rule.h"
#include "loops.h"

namespace fastcurv {

bool sgd_cpu(const Args& args, Dtype param, Dtype state, int variant) {
  switch (variant) {
    case SgdOp::kWithMomentum: return run_rule<SgdRule, SgdOp::kWithMomentum>(args, param, state);
    default: return run_rule<SgdRule, SgdOp::kPlain>(args, param, state);
  }
}

}  // namespace fastcurv
