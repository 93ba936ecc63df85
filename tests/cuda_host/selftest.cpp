// Kernels that test the emulator itself: what they compute is known, or is known to be wrong.
#include "cuda_host.h"
// The kernels come after the emulator, which defines their vocabulary.
#include "common.cuh"

namespace selftest {

struct SumArgs {
  const float* in;
  float* out;  // one sum per block
  int count;   // elements per block
};

// The textbook reduction: shuffles within a warp, shared memory between warps. Without its barrier the first warp adds
// up what the others have perhaps not written yet.
template <bool barrier>
__global__ void block_sum(SumArgs args) {
  __shared__ float partial[cuda_host::kWarp];
  float sum = 0.0f;
  for (int i = threadIdx.x; i < args.count; i += blockDim.x) sum += args.in[blockIdx.x * args.count + i];
  for (int delta = 16; delta > 0; delta /= 2) sum += __shfl_down_sync(0xffffffffu, sum, delta);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  if (barrier) __syncthreads();
  if (threadIdx.x < 32) {
    sum = threadIdx.x < blockDim.x / 32 ? partial[threadIdx.x] : 0.0f;
    for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bits);
    if (threadIdx.x == 0) args.out[blockIdx.x] = sum;
  }
}

struct TurnArgs {
  float* values;  // one per thread
  int rounds;
};

// Every thread replaces its value by its neighbour's, `rounds` times: two barriers a round, each of them needed. The
// first keeps a value until its reader has it, the second keeps a reader off until the value is there.
template <bool first, bool second>
__global__ void rotate(TurnArgs args) {
  __shared__ float row[256];
  float mine = args.values[threadIdx.x];
  for (int round = 0; round < args.rounds; ++round) {
    if (first) __syncthreads();
    row[threadIdx.x] = mine;
    if (second) __syncthreads();
    mine = row[(threadIdx.x + 1) % blockDim.x];
  }
  args.values[threadIdx.x] = mine;
}

struct ShuffleArgs {
  int* out;  // [kind][thread]
  int operand, width;
};

__global__ void shuffles(ShuffleArgs args) {
  const int thread = threadIdx.x;
  const int threads = blockDim.x;
  args.out[thread] = __shfl_sync(0xffffffffu, thread, args.operand, args.width);
  args.out[threads + thread] = __shfl_up_sync(0xffffffffu, thread, args.operand, args.width);
  args.out[2 * threads + thread] = __shfl_down_sync(0xffffffffu, thread, args.operand, args.width);
  args.out[3 * threads + thread] = __shfl_xor_sync(0xffffffffu, thread, args.operand, args.width);
  __syncwarp();
  // Two halves of a warp on ways of their own.
  const bool low = thread % 32 < 16;
  int sum = thread;
  if (low) {
    for (int bits = 8; bits > 0; bits /= 2) sum += __shfl_xor_sync(0x0000ffffu, sum, bits);
  } else {
    sum = -sum;
    for (int bits = 8; bits > 0; bits /= 2) sum += __shfl_xor_sync(0xffff0000u, sum, bits);
  }
  args.out[4 * threads + thread] = sum;
}

struct CountArgs {
  long long* ticket;
  int* threads;  // counts every thread of the grid
  int* last;     // counts the blocks that were last
  int* seen;     // what the last block has seen in `threads`
};

__global__ void count(CountArgs args) {
  atomicAdd(args.threads, 1);
  if (fastcurv::is_last_block(args.ticket) && threadIdx.x == 0) {
    atomicAdd(args.last, 1);
    *args.seen = *args.threads;
  }
}

struct StuckArgs {
  int at_block_barriers;
};

__global__ void stuck(StuckArgs args) {
  if (threadIdx.x == 5) {
    if (args.at_block_barriers) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  }
  __syncthreads();
}

struct SharedArgs {
  double* out;
  int count;  // doubles that are written
};

__global__ void use_shared(SharedArgs args) {
  FC_DYNAMIC_SHARED(double, shared);
  if (threadIdx.x == 0) args.out[0] = shared[0];
  for (int i = threadIdx.x; i < args.count; i += blockDim.x) shared[i] = i;
  __syncthreads();
  if (threadIdx.x == 0) args.out[1] = shared[args.count - 1];
}

struct PackArgs {
  const float* in;
  float* out;
};

__global__ void copy_pack(PackArgs args) { fastcurv::store_pack<4>(args.out, fastcurv::load_pack<4>(args.in)); }

}  // namespace selftest

const std::vector<cuda_host::Kernel> cuda_host::kernels = {
    CUDA_HOST_KERNEL(selftest::block_sum<true>),
    CUDA_HOST_KERNEL(selftest::block_sum<false>),
    CUDA_HOST_KERNEL(selftest::rotate<true, true>),
    CUDA_HOST_KERNEL(selftest::rotate<false, true>),
    CUDA_HOST_KERNEL(selftest::rotate<true, false>),
    CUDA_HOST_KERNEL(selftest::shuffles),
    CUDA_HOST_KERNEL(selftest::count),
    CUDA_HOST_KERNEL(selftest::stuck),
    CUDA_HOST_KERNEL(selftest::use_shared),
    CUDA_HOST_KERNEL(selftest::copy_pack),
};
