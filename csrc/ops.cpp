#include "ops.h"

#include "adam_rule.h"
#include "lamb_rule.h"
#include "lars_rule.h"
#include "lookahead_rule.h"
#include "nero_rule.h"
#include "ranger_rule.h"
#include "sgd_rule.h"

namespace fastcurv {

#ifdef FASTCURV_HAS_CUDA
#define FC_BACK_ENDS(op) op##_cpu, op##_cuda
#else
#define FC_BACK_ENDS(op) op##_cpu
#endif

const std::vector<Op>& ops() {
  static const std::vector<Op> all = {
      {"adam",
       "AdamRule",
       {"params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "mu_products", "steps"},
       {"lr", "beta1", "beta2", "eps", "weight_decay", "mu_decay"},
       {"rule", "decoupled_weight_decay", "maximize"},
       {"adam", "amsgrad", "radam", "nadam", "yogi"},
       AdamOp::kExpAvg,
       -1,
       FC_BACK_ENDS(adam)},
      {"lamb",
       "LambRule",
       {"params", "grads", "exp_avgs", "exp_avg_sqs", "steps"},
       {"lr", "beta1", "beta2", "eps", "weight_decay"},
       {"adaptive", "maximize"},
       {},
       LambOp::kExpAvg,
       -1,
       FC_BACK_ENDS(lamb)},
      {"lars",
       "LarsRule",
       {"params", "grads", "momentum_buffers"},
       {"lr", "momentum", "weight_decay", "trust_coefficient", "eps"},
       {"nesterov", "adaptive", "maximize"},
       {},
       LarsOp::kMomentumBuffer,
       -1,
       FC_BACK_ENDS(lars)},
      {"lookahead", "LookaheadRule", {"params", "slow_buffers"}, {"alpha"}, {}, {}, -1, -1, FC_BACK_ENDS(lookahead)},
      {"nero",
       "NeroRule",
       {"params", "grads", "row_exp_avg_sqs", "scales", "steps"},
       {"lr", "beta"},
       {"constraints", "maximize"},
       {},
       -1,
       -1,
       FC_BACK_ENDS(nero)},
      {"ranger",
       "RangerRule",
       {"params", "grads", "exp_avgs", "exp_avg_sqs", "slow_buffers", "steps"},
       {"lr", "beta1", "beta2", "eps", "weight_decay", "alpha", "n_sma_threshold"},
       {"k", "use_gc", "gc_conv_only", "scaled_weight_decay", "maximize"},
       {},
       RangerOp::kExpAvg,
       -1,
       FC_BACK_ENDS(ranger)},
      {"sgd",
       "SgdRule",
       {"params", "grads", "momentum_buffers"},
       {"lr", "momentum", "dampening", "weight_decay"},
       {"nesterov", "is_first_step", "maximize"},
       {},
       SgdOp::kMomentumBuffer,
       SgdOp::kMomentumBuffer,
       FC_BACK_ENDS(sgd)},
  };
  return all;
}

}  // namespace fastcurv
