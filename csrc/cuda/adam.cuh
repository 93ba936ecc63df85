// Adam, AdamW and AMSGrad over a list of tensors in one launch: see ../adam_rule.h for the formula.
//
// Floor: bytes over memory bandwidth (28 B per element in float32). A thread has four or five independent 16-byte loads
// on their way before it uses the first: at 768 threads a multiprocessor that is 48 KB or more, where the latency of an
// H200 times its bandwidth is 22 to 29 KB. No cache hints: every line is used once a step, and written where it is
// read.
#pragma once
#include "adam_rule.h"
#include "common.cuh"

namespace fastcurv {

// Where a thread is in the lists of one tensor.
template <typename Param, typename State, SecondMoment rule>
struct AdamPointers {
  Param* param;
  const Param* grad;
  State* exp_avg;
  State* exp_avg_sq;
  State* max_exp_avg_sq;  // null without AMSGrad

  __device__ __forceinline__ AdamPointers(const Table& table, const Chunk& chunk)
      : param(list_pointer<Param>(table, chunk.tensor, kParam, chunk.begin)),
        grad(list_pointer<Param>(table, chunk.tensor, kGrad, chunk.begin)),
        exp_avg(list_pointer<State>(table, chunk.tensor, kExpAvg, chunk.begin)),
        exp_avg_sq(list_pointer<State>(table, chunk.tensor, kExpAvgSq, chunk.begin)),
        max_exp_avg_sq(nullptr) {
    if (rule == SecondMoment::amsgrad) {
      max_exp_avg_sq = list_pointer<State>(table, chunk.tensor, kMaxExpAvgSq, chunk.begin);
    }
  }
  __device__ __forceinline__ bool aligned() const {
    return aligned16(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq);
  }
  __device__ __forceinline__ void operator+=(unsigned int elements) {
    param += elements;
    grad += elements;
    exp_avg += elements;
    exp_avg_sq += elements;
    if (rule == SecondMoment::amsgrad) max_exp_avg_sq += elements;
  }
};

template <int width, typename Param, typename State, SecondMoment rule, typename T>
__device__ __forceinline__ void adam_pack(const AdamCoefficients<T>& c, const AdamPointers<Param, State, rule>& at) {
  Pack<Param, width> p = load_pack<width>(at.param);
  const Pack<Param, width> g = load_pack<width>(at.grad);
  Pack<State, width> m = load_pack<width>(at.exp_avg);
  Pack<State, width> v = load_pack<width>(at.exp_avg_sq);
  Pack<State, width> u = {};
  if (rule == SecondMoment::amsgrad) u = load_pack<width>(at.max_exp_avg_sq);
#pragma unroll
  for (int k = 0; k < width; ++k) {
    T param = load(p.values[k]), exp_avg = load(m.values[k]), exp_avg_sq = load(v.values[k]);
    T max_exp_avg_sq = load(u.values[k]);
    adam_element<rule, T>(c, param, load(g.values[k]), exp_avg, exp_avg_sq, max_exp_avg_sq);
    store(p.values[k], param);
    store(m.values[k], exp_avg);
    store(v.values[k], exp_avg_sq);
    store(u.values[k], max_exp_avg_sq);
  }
  store_pack<width>(at.param, p);
  store_pack<width>(at.exp_avg, m);
  store_pack<width>(at.exp_avg_sq, v);
  if (rule == SecondMoment::amsgrad) store_pack<width>(at.max_exp_avg_sq, u);
}

// Any grid is right, one block included, also for a table without chunks.
template <typename Param, typename State, SecondMoment rule>
__global__ void __launch_bounds__(kAdamLaunch.threads, kAdamLaunch.blocks_per_multiprocessor)
    adam_kernel(AdamArgs args) {
  using T = typename Compute<Param>::type;
  using Pointers = AdamPointers<Param, State, rule>;
  if (adam_skips(args)) return;  // all threads alike, and before any ticket is drawn
  const Table table{args.table};

  // The coefficients cost two integer powers, a square root and two divisions in double: one thread computes them, and
  // only when the step count differs from the last chunk's. All threads read the same count (none is written before
  // every block is done), so they agree on whether to meet at the barriers.
  __shared__ AdamCoefficients<T> shared;
  AdamCoefficients<T> c = {};
  float last_step = 0.0f;

  for (long long index = blockIdx.x; index < table.chunks(); index += gridDim.x) {
    const Chunk chunk = chunk_at(table, index);
    const float step = *list_pointer<float>(table, chunk.tensor, kStep) + 1.0f;
    if (index == blockIdx.x || step != last_step) {
      __syncthreads();  // nobody still copies the last ones
      if (threadIdx.x == 0) shared = adam_coefficients<T>(adam_hyper(args), static_cast<long long>(step));
      __syncthreads();
      c = shared;
      last_step = step;
    }
    for_each_pack<kPackWidth<Param, State>>(
        chunk.count, [&] { return Pointers(table, chunk_at(table, index)); },
        [&](auto width, const Pointers& at) { adam_pack<decltype(width)::value>(c, at); });
  }
  advance_steps(args.table, kStep);
}

}  // namespace fastcurv
