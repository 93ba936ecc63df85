// Launches adam.cuh: which instance serves which dtypes and rule.
#include "adam.cuh"
#include "fastcurv.h"
#include "launch.h"

namespace fastcurv {
namespace {

using AdamKernel = void (*)(AdamArgs);

template <typename Param, typename State>
AdamKernel select(SecondMoment rule) {
  return rule == SecondMoment::amsgrad ? adam_kernel<Param, State, SecondMoment::amsgrad>
                                       : adam_kernel<Param, State, SecondMoment::adam>;
}

AdamKernel select(Dtype param, Dtype state, SecondMoment rule) {
  switch (param) {
    case Dtype::float64: return select<double, double>(rule);
    case Dtype::bfloat16: return select<bfloat16, float>(rule);
    case Dtype::float16: return select<float16, float>(rule);
    case Dtype::float32: break;
  }
  return state == Dtype::bfloat16 ? select<float, bfloat16>(rule) : select<float, float>(rule);
}

}  // namespace

int adam_cuda(const AdamArgs& args, Dtype param, Dtype state, SecondMoment rule, int device, int blocks, void* stream) {
  return launch(select(param, state, rule), blocks, kAdamLaunch.threads, args, device, stream);
}

}  // namespace fastcurv
