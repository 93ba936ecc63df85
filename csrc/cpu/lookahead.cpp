// The slow update of Lookahead over a list of tensors: see ../lookahead_rule.h for the formula.
#include "../fastcurv.h"
#include "../lookahead_rule.h"
#include "loops.h"

namespace fastcurv {

bool lookahead_cpu(const Args& args, Dtype param, Dtype state, int) {
  return run_rule<LookaheadRule, 0>(args, param, state);
}

}  // namespace fastcurv
