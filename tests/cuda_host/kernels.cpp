// Every kernel of csrc/cuda as the host emulator runs it, instance by instance.
#include "cuda_host.h"
// The kernels come after the emulator, which defines their vocabulary.
#include "adam.cuh"
#include "gram_schmidt.cuh"
#include "kron_apply.cuh"
#include "kron_factor.cuh"
#include "kron_inverse.cuh"
#include "kron_root.cuh"
#include "lamb.cuh"
#include "lars.cuh"
#include "lookahead.cuh"
#include "nero.cuh"
#include "newton_schulz.cuh"
#include "ranger.cuh"
#include "sgd.cuh"

#define FOR_DTYPES(instance, rule, variant)                                                                  \
  instance(rule, float, float, variant), instance(rule, double, double, variant),                            \
      instance(rule, fastcurv::bfloat16, float, variant), instance(rule, fastcurv::float16, float, variant), \
      instance(rule, float, fastcurv::bfloat16, variant)

#define KERNEL(kernel, rule, param, state, variant) \
  CUDA_HOST_KERNEL(fastcurv::kernel<fastcurv::rule<param, state, variant>>)
#define MATRIX(kernel, storage) CUDA_HOST_KERNEL(fastcurv::kernel<storage>)
#define STATISTIC(storage, sums)                                        \
  CUDA_HOST_KERNEL(fastcurv::kron_factor_kernel<storage, sums, false>), \
      CUDA_HOST_KERNEL(fastcurv::kron_factor_kernel<storage, sums, true>)
#define UPDATE(rule, param, state, variant) KERNEL(update_kernel, rule, param, state, variant)
#define ALL(rule, param, state, variant)                                                                  \
  KERNEL(partials_kernel, rule, param, state, variant), KERNEL(rows_kernel, rule, param, state, variant), \
      UPDATE(rule, param, state, variant)

const std::vector<cuda_host::Kernel> cuda_host::kernels = {
    FOR_DTYPES(UPDATE, AdamRule, 0),
    FOR_DTYPES(UPDATE, AdamRule, 1),
    FOR_DTYPES(UPDATE, AdamRule, 2),
    FOR_DTYPES(UPDATE, AdamRule, 3),
    FOR_DTYPES(UPDATE, AdamRule, 4),
    FOR_DTYPES(UPDATE, SgdRule, 0),
    FOR_DTYPES(UPDATE, SgdRule, 1),
    FOR_DTYPES(UPDATE, LookaheadRule, 0),
    FOR_DTYPES(ALL, RangerRule, 0),
    FOR_DTYPES(ALL, NeroRule, 0),
    FOR_DTYPES(ALL, LarsRule, 0),
    FOR_DTYPES(ALL, LambRule, 0),
    MATRIX(newton_schulz_kernel, float),
    MATRIX(newton_schulz_kernel, double),
    MATRIX(newton_schulz_kernel, fastcurv::bfloat16),
    MATRIX(newton_schulz_kernel, fastcurv::float16),
    MATRIX(gram_schmidt_kernel, float),
    MATRIX(gram_schmidt_kernel, double),
    MATRIX(kron_apply_kernel, float),
    MATRIX(kron_apply_kernel, double),
    STATISTIC(float, float),
    STATISTIC(float, double),
    STATISTIC(double, double),
    STATISTIC(fastcurv::bfloat16, float),
    STATISTIC(fastcurv::bfloat16, double),
    STATISTIC(fastcurv::float16, float),
    STATISTIC(fastcurv::float16, double),
    MATRIX(kron_inverse_kernel, float),
    MATRIX(kron_inverse_kernel, double),
    MATRIX(kron_root_kernel, float),
    MATRIX(kron_root_kernel, double),
};
