// Every kernel of csrc/cuda as the host emulator runs it, instance by instance.
#include "cuda_host.h"
// The kernels come after the emulator, which defines their vocabulary.
#include "adam.cuh"

#define ADAM(param, state)                                                             \
  CUDA_HOST_KERNEL(fastcurv::adam_kernel<param, state, fastcurv::SecondMoment::adam>), \
      CUDA_HOST_KERNEL(fastcurv::adam_kernel<param, state, fastcurv::SecondMoment::amsgrad>)

const std::vector<cuda_host::Kernel> cuda_host::kernels = {
    ADAM(float, float),
    ADAM(double, double),
    ADAM(fastcurv::bfloat16, float),
    ADAM(fastcurv::float16, float),
    ADAM(float, fastcurv::bfloat16),
};
