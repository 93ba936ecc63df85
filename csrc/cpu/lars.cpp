// LARS over a list of tensors: see ../lars_rule.h for the formula.
#include "../fastcurv.h"
#include "../lars_rule.h"
#include "loops.h"

namespace fastcurv {

bool lars_cpu(const Args& args, Dtype param, Dtype state, int) { return run_rule<LarsRule, 0>(args, param, state); }

}  // namespace fastcurv
