// Adam, AdamW and AMSGrad over a list of tensors: see ../adam_rule.h for the formula.
// Floor: bytes over memory bandwidth (28 B per element in float32), plus about 0.1 us per tensor.
#include <cstdint>

#include "../adam_rule.h"
#include "../fastcurv.h"
#include "parallel.h"
#include "simd.h"

namespace fastcurv {
namespace {

template <typename Param, typename State, SecondMoment rule>
struct AdamLoop {
  using T = typename Compute<Param>::type;
  using Coefficients = AdamCoefficients<T>;

  static FC_INLINE void run(const Coefficients* coefficients, Param* __restrict param, const Param* __restrict grad,
                            State* __restrict exp_avg, State* __restrict exp_avg_sq, State* __restrict max_exp_avg_sq,
                            long long count) {
    const Coefficients c = *coefficients;
#pragma omp simd
    for (long long i = 0; i < count; ++i) {
      T p = load(param[i]), m = load(exp_avg[i]), v = load(exp_avg_sq[i]);
      T u = rule == SecondMoment::amsgrad ? load(max_exp_avg_sq[i]) : T(0);
      adam_element<rule, T>(c, p, load(grad[i]), m, v, u);
      store(param[i], p);
      store(exp_avg[i], m);
      store(exp_avg_sq[i], v);
      if (rule == SecondMoment::amsgrad) store(max_exp_avg_sq[i], u);
    }
  }
};

template <typename Param, typename State, SecondMoment rule>
void run(const AdamArgs& args) {
  using Loop = AdamLoop<Param, State, rule>;
  using Coefficients = typename Loop::Coefficients;
  if (adam_skips(args)) return;
  const Table table{args.table};
  const AdamHyper hyper = adam_hyper(args);

  // Tensors share their step count but for those whose gradient was missing at times: one computation per run of
  // equals.
  std::vector<Coefficients> coefficients;
  std::vector<int32_t> which(table.tensors());
  float last_step = -1.0f;
  for (long long t = 0; t < table.tensors(); ++t) {
    float* step = table.pointer<float>(t, kStep);
    *step += 1.0f;
    if (*step != last_step) {
      last_step = *step;
      coefficients.push_back(adam_coefficients<typename Loop::T>(hyper, static_cast<long long>(last_step)));
    }
    which[t] = static_cast<int32_t>(coefficients.size() - 1);
  }

  const auto loop =
      Clones<Loop>::template select<const Coefficients*, Param*, const Param*, State*, State*, State*, long long>();
  for_each_element_range(table, [&](long long t, long long begin, long long end) {
    State* max_exp_avg_sq = table.pointer<State>(t, kMaxExpAvgSq);
    loop(&coefficients[which[t]], table.pointer<Param>(t, kParam) + begin, table.pointer<Param>(t, kGrad) + begin,
         table.pointer<State>(t, kExpAvg) + begin, table.pointer<State>(t, kExpAvgSq) + begin,
         max_exp_avg_sq ? max_exp_avg_sq + begin : nullptr, end - begin);
  });
}

template <typename Param, typename State>
void run(const AdamArgs& args, SecondMoment rule) {
  if (rule == SecondMoment::amsgrad) {
    run<Param, State, SecondMoment::amsgrad>(args);
  } else {
    run<Param, State, SecondMoment::adam>(args);
  }
}

}  // namespace

void adam_cpu(const AdamArgs& args, Dtype param, Dtype state, SecondMoment rule) {
  switch (param) {
    case Dtype::float64: return run<double, double>(args, rule);
    case Dtype::bfloat16: return run<bfloat16, float>(args, rule);
    case Dtype::float16: return run<float16, float>(args, rule);
    case Dtype::float32:
      return state == Dtype::bfloat16 ? run<float, bfloat16>(args, rule) : run<float, float>(args, rule);
  }
}

}  // namespace fastcurv
