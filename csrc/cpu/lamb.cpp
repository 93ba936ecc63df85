// LAMB over a list of tensors: see ../lamb_rule.h for the formula.
#include "../fastcurv.h"
#include "../lamb_rule.h"
#include "loops.h"

namespace fastcurv {

bool lamb_cpu(const Args& args, Dtype param, Dtype state, int) { return run_rule<LambRule, 0>(args, param, state); }

}  // namespace fastcurv
