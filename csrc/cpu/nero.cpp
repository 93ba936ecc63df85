// Nero over a list of tensors: see ../nero_rule.h for the formula.
#include "../fastcurv.h"
#include "../nero_rule.h"
#include "loops.h"

namespace fastcurv {

bool nero_cpu(const Args& args, Dtype param, Dtype state, int) { return run_rule<NeroRule, 0>(args, param, state); }

}  // namespace fastcurv
