// Compiles and runs CUDA device code with the host compiler: the part of CUDA's vocabulary that our kernels use, and a
// launch by name for the tests. Include this first, then the kernels, then list them:
//
//   const std::vector<cuda_host::Kernel> cuda_host::kernels = {CUDA_HOST_KERNEL(fastcurv::adam_kernel<float, ...>)};
//
// Limits. Blocks run one after another, so a block that waits for another one hangs, and what is between a block's work
// and its ticket (barrier, fences) is not seen to be needed. Atomics do what they say because nothing runs at the same
// time. Static shared memory keeps what the last block left in it: run more than one. Dynamic shared memory begins as
// NaN.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstring>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define FC_DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(cuda_host::dynamic_shared.data())
#define __syncthreads() cuda_host::block().block_barrier(__LINE__)
#define __syncwarp(...) cuda_host::block().warp_barrier(cuda_host::mask_of(__VA_ARGS__), __LINE__)
#define __shfl_sync(mask, ...) cuda_host::shuffle(cuda_host::shfl_lane, __LINE__, mask, __VA_ARGS__)
#define __shfl_up_sync(mask, ...) cuda_host::shuffle(cuda_host::shfl_up_lane, __LINE__, mask, __VA_ARGS__)
#define __shfl_down_sync(mask, ...) cuda_host::shuffle(cuda_host::shfl_down_lane, __LINE__, mask, __VA_ARGS__)
#define __shfl_xor_sync(mask, ...) cuda_host::shuffle(cuda_host::shfl_xor_lane, __LINE__, mask, __VA_ARGS__)

namespace cuda_host {

struct SanitizerSite {  // the start of what gcc and clang pass
  const char* file;
  unsigned int line, column;
};

struct Index3 {
  unsigned int x = 0, y = 0, z = 0;
};

inline Block& block() {
  static Block* the_one = new Block;  // never destroyed: its stacks may be in use when the process ends
  return *the_one;
}

// Behind what the block has asked for: where it writes too far.
constexpr size_t kBorderBytes = 4096;
inline std::vector<unsigned long long> dynamic_shared;

inline unsigned int mask_of(unsigned int mask = 0xffffffffu) { return mask; }

// Which lane each kind of shuffle reads, among `width` neighbours (CUDA C++ Programming Guide, Warp Shuffle Functions).
inline int shfl_lane(int lane, int source, int width) { return lane / width * width + (source & (width - 1)); }
inline int shfl_up_lane(int lane, int delta, int width) { return lane % width < delta ? lane : lane - delta; }
inline int shfl_down_lane(int lane, int delta, int width) { return lane % width + delta < width ? lane + delta : lane; }
inline int shfl_xor_lane(int lane, int bits, int width) {
  return (lane ^ bits) < lane / width * width + width ? lane ^ bits : lane;
}

template <typename T>
T shuffle(int (*source)(int, int, int), int line, unsigned int mask, T value, int operand, int width = kWarp) {
  static_assert(sizeof(T) <= sizeof(unsigned long long), "shuffles move at most eight bytes");
  std::memcpy(&block().current().slot, &value, sizeof(T));
  block().warp_barrier(mask, line);  // all have shown theirs
  const int lane = block().current_thread() % kWarp;
  const unsigned long long* shown = block().shown(source(lane, operand, width), mask);
  if (shown) {
    std::memcpy(&value, shown, sizeof(T));
  } else {
    std::memset(&value, 0xff, sizeof(T));  // undefined on the device: a NaN here
  }
  block().warp_barrier(mask, line);  // all have looked
  return value;
}

}  // namespace cuda_host

// The compiler puts a check before every access (-fsanitize=alignment,null) and calls this where it fails. A handler of
// our own needs no sanitizer library, and lets Python raise where the library would end the process.
extern "C" [[noreturn]] inline __attribute__((used)) void __ubsan_handle_type_mismatch_v1(
    cuda_host::SanitizerSite* site, void* at) {
  char address[32];
  std::snprintf(address, sizeof address, "%p", at);
  cuda_host::block().fail(std::string("misaligned or null access to ") + address + " at " + site->file + ":" +
                          std::to_string(site->line));
}

inline cuda_host::Index3 threadIdx, blockIdx, blockDim, gridDim;

inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T, typename V>
T atomicAdd(T* address, V value) {
  const T old = *address;
  *address = old + value;
  return old;
}

inline unsigned int atomicInc(unsigned int* address, unsigned int last) {
  const unsigned int old = *address;
  *address = old >= last ? 0 : old + 1;
  return old;
}

namespace cuda_host {

// A kernel of one argument, by the name that NVRTC would compile it under.
struct Kernel {
  template <typename Args>
  Kernel(const char* name, void (*kernel)(Args))
      : name(name), args_bytes(sizeof(Args)), kernel(reinterpret_cast<void (*)()>(kernel)) {
    call = [](void (*kernel)(), const void* bytes) {
      Args args;
      std::memcpy(&args, bytes, sizeof args);
      reinterpret_cast<void (*)(Args)>(kernel)(args);
    };
  }
  const char* name;
  size_t args_bytes;
  void (*kernel)();
  void (*call)(void (*kernel)(), const void* args);
};

#define CUDA_HOST_KERNEL(...) cuda_host::Kernel(#__VA_ARGS__, __VA_ARGS__)

extern const std::vector<Kernel> kernels;

inline std::string launch(const std::string& name, int blocks, int threads, int shared_bytes, const void* args,
                          size_t args_bytes, Order order, unsigned int seed) {
  const auto found = std::find_if(kernels.begin(), kernels.end(), [&](const Kernel& k) { return name == k.name; });
  if (found == kernels.end()) return name + " is not among the kernels of this library";
  if (args_bytes != found->args_bytes) return name + " takes an argument of another size";
  std::mt19937 random(seed);
  std::vector<int> turns(blocks);
  std::iota(turns.begin(), turns.end(), 0);
  if (order == Order::descending) std::reverse(turns.begin(), turns.end());
  if (order == Order::random) std::shuffle(turns.begin(), turns.end(), random);
  gridDim = {static_cast<unsigned int>(blocks), 1, 1};
  blockDim = {static_cast<unsigned int>(threads), 1, 1};
  constexpr unsigned long long nan = ~0ull;
  const size_t border = (shared_bytes + sizeof nan - 1) / sizeof nan;
  for (int b : turns) {
    dynamic_shared.assign(border + kBorderBytes / sizeof nan, nan);
    blockIdx.x = static_cast<unsigned int>(b);
    const std::string error = block().run(
        threads, order, random, [&](int) { found->call(found->kernel, args); },
        [](int thread) { threadIdx.x = static_cast<unsigned int>(thread); });
    if (!error.empty()) return name + ", block " + std::to_string(b) + ": " + error;
    if (std::any_of(dynamic_shared.begin() + border, dynamic_shared.end(), [](auto word) { return word != nan; })) {
      return name + ", block " + std::to_string(b) + ": wrote behind its shared memory";
    }
  }
  return "";
}

}  // namespace cuda_host

// Returns null, or what went wrong, in memory that the next call reuses.
extern "C" __attribute__((visibility("default"))) const char* cuda_host_launch(const char* name, int blocks,
                                                                               int threads, int shared_bytes,
                                                                               const void* args, size_t args_bytes,
                                                                               int order, unsigned int seed) {
  static std::string error;
  error = cuda_host::launch(name, blocks, threads, shared_bytes, args, args_bytes, static_cast<cuda_host::Order>(order),
                            seed);
  return error.empty() ? nullptr : error.c_str();
}
