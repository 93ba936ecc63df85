// Ranger over a list of tensors: see ../ranger_rule.h for the formula.
#include "../fastcurv.h"
#include "../ranger_rule.h"
#include "loops.h"

namespace fastcurv {

bool ranger_cpu(const Args& args, Dtype param, Dtype state, int) { return run_rule<RangerRule, 0>(args, param, state); }

}  // namespace fastcurv
