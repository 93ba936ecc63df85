// The Adam family over a list of tensors: see ../adam_rule.h for the formula.
#include "../adam_rule.h"
#include "../fastcurv.h"
#include "loops.h"

namespace fastcurv {

bool adam_cpu(const Args& args, Dtype param, Dtype state, int variant) {
  switch (variant) {
    case AdamOp::kAmsgrad: return run_rule<AdamRule, AdamOp::kAmsgrad>(args, param, state);
    case AdamOp::kRadam: return run_rule<AdamRule, AdamOp::kRadam>(args, param, state);
    case AdamOp::kNadam: return run_rule<AdamRule, AdamOp::kNadam>(args, param, state);
    case AdamOp::kYogi: return run_rule<AdamRule, AdamOp::kYogi>(args, param, state);
    default: return run_rule<AdamRule, AdamOp::kAdam>(args, param, state);
  }
}

}  // namespace fastcurv
