// Adam, AdamW and AMSGrad over a list of tensors in one launch: see ../adam_rule.h for the formula.
//
// Floor: bytes over memory bandwidth (28 B per element in float32). A thread has four or five independent 16-byte loads
// on their way before it uses the first: at 1024 threads a multiprocessor that is 64 KB or more, about twice what
// covers the latency of an H200. No cache hints: every line is touched once a step, and written where it was read.
#pragma once
#include "adam_rule.h"
#include "common.cuh"

namespace fastcurv {

// The lists of one tensor, from the first element of a chunk on.
template <typename Param, typename State>
struct AdamPointers {
  Param* param;
  const Param* grad;
  State* exp_avg;
  State* exp_avg_sq;
  State* max_exp_avg_sq;  // null without AMSGrad
};

template <int width, SecondMoment rule, typename Param, typename State, typename T>
__device__ __forceinline__ void adam_pack(const AdamCoefficients<T>& c, const AdamPointers<Param, State>& at,
                                          long long i) {
  Pack<Param, width> p = load_pack<width>(at.param + i);
  const Pack<Param, width> g = load_pack<width>(at.grad + i);
  Pack<State, width> m = load_pack<width>(at.exp_avg + i);
  Pack<State, width> v = load_pack<width>(at.exp_avg_sq + i);
  Pack<State, width> u = {};
  if (rule == SecondMoment::amsgrad) u = load_pack<width>(at.max_exp_avg_sq + i);
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
  store_pack<width>(at.param + i, p);
  store_pack<width>(at.exp_avg + i, m);
  store_pack<width>(at.exp_avg_sq + i, v);
  if (rule == SecondMoment::amsgrad) store_pack<width>(at.max_exp_avg_sq + i, u);
}

// Any grid is right, one block included, also for a table without chunks. A few blocks per multiprocessor are fastest.
template <typename Param, typename State, SecondMoment rule>
__global__ void __launch_bounds__(kAdamLaunch.threads, kAdamLaunch.blocks_per_multiprocessor)
    adam_kernel(AdamArgs args) {
  using T = typename Compute<Param>::type;
  if (adam_skips(args)) return;  // all threads alike, and before any ticket is drawn
  const Table table{args.table};

  // The coefficients cost two integer powers, a square root and a division in double: one thread computes them, and
  // only when the step count differs from the last chunk's. All threads read the same step (no step is written before
  // every block is done), so they agree on whether to meet at the barriers.
  __shared__ AdamCoefficients<T> shared;
  AdamCoefficients<T> c;
  float last_step = 0.0f;

  for (long long index = blockIdx.x; index < table.chunks(); index += gridDim.x) {
    const Chunk chunk = chunk_at(table, index);
    const float step = *table.pointer<float>(chunk.tensor, kStep) + 1.0f;
    if (index == blockIdx.x || step != last_step) {
      __syncthreads();  // nobody still copies the last ones
      if (threadIdx.x == 0) shared = adam_coefficients<T>(adam_hyper(args), static_cast<long long>(step));
      __syncthreads();
      c = shared;
      last_step = step;
    }
    AdamPointers<Param, State> at;
    at.param = table.pointer<Param>(chunk.tensor, kParam) + chunk.begin;
    at.grad = table.pointer<Param>(chunk.tensor, kGrad) + chunk.begin;
    at.exp_avg = table.pointer<State>(chunk.tensor, kExpAvg) + chunk.begin;
    at.exp_avg_sq = table.pointer<State>(chunk.tensor, kExpAvgSq) + chunk.begin;
    at.max_exp_avg_sq = nullptr;
    if (rule == SecondMoment::amsgrad) {
      at.max_exp_avg_sq = table.pointer<State>(chunk.tensor, kMaxExpAvgSq) + chunk.begin;
    }
    // Chunks start at multiples of 2048 elements, so that this says whether the tensors themselves are aligned.
    const bool aligned = aligned16(at.param, at.grad, at.exp_avg, at.exp_avg_sq, at.max_exp_avg_sq);
    for_each_pack<kPackWidth<Param, State>>(chunk.count, aligned, [&](auto width, long long i) {
      adam_pack<decltype(width)::value, rule>(c, at, i);
    });
  }
  advance_steps(args.table, kStep);
}

}  // namespace fastcurv
