// What the multi-tensor device kernels share. nvcc, NVRTC (which has no standard header) and the host emulator of
// tests/cuda_host compile this text, so it includes nothing but headers that are like it.
#pragma once
#include "rule.h"

namespace fastcurv {

constexpr unsigned int kWarp = 32;
constexpr unsigned int kWholeWarp = 0xffffffffu;
static_assert(kWarp == kLanes, "a lane of a sum is a lane of a warp");

// `width` neighbouring elements. With 16 bytes or more of them, aligned so, each copy is a row of 16-byte accesses.
template <typename T, int width>
struct alignas(sizeof(T) * width < 16 ? sizeof(T) * width : 16) Pack {
  T values[width];
};

template <int width, typename T>
__device__ __forceinline__ Pack<T, width> load_pack(const T* pointer) {
  return *reinterpret_cast<const Pack<T, width>*>(pointer);
}

template <int width, typename T>
__device__ __forceinline__ void store_pack(T* pointer, const Pack<T, width>& pack) {
  *reinterpret_cast<Pack<T, width>*>(pointer) = pack;
}

// Adds up the lanes of every group of `width` neighbours, in halves. All lanes of a group get the sum: addition
// commutes, so that it has the bits of lane 0.
template <int kSums, typename T>
__device__ __forceinline__ void add_lanes(T* sums, unsigned int width) {
  for (unsigned int w = width / 2; w > 0; w /= 2) {
#pragma unroll
    for (int k = 0; k < kSums; ++k) sums[k] += __shfl_xor_sync(kWholeWarp, sums[k], static_cast<int>(w));
  }
}

// The number of the one list of a set.
constexpr int only_list(unsigned int set) { return set > 1 ? 1 + only_list(set >> 1) : 0; }

// Whether all addresses are multiples of 16.
template <typename... Pointers>
__device__ __forceinline__ bool aligned16(Pointers... pointers) {
  return ((reinterpret_cast<unsigned long long>(pointers) | ...) & 15) == 0;
}

// Of a word that names a chunk or a partial.
__device__ __forceinline__ long long tensor_of(unsigned long long word) { return static_cast<long long>(word >> 32); }
__device__ __forceinline__ long long number_of(unsigned long long word) {
  return static_cast<long long>(word & 0xffffffffu);
}

// Elements begin .. begin + count - 1 of a tensor. Positions in a tensor are 64-bit. Those in a chunk are
// 32-bit, and unsigned, which saves the sign extensions; a chunk has less than 2^30 elements. Where it is not made of
// whole rows it has a multiple of 2048, so that a chunk is aligned where its tensor is.
struct Chunk {
  long long tensor;
  long long begin;
  unsigned int count;
};

template <typename Rule>
__device__ __forceinline__ Chunk chunk_at(const Table& table, long long index) {
  const unsigned long long word = table.chunk(index);
  Chunk chunk;
  chunk.tensor = tensor_of(word);
  const long long size = Rule::kSums ? table.chunk_size(chunk.tensor) : table.chunk_elements();
  chunk.begin = number_of(word) * size;
  const long long rest = table.numel(chunk.tensor) - chunk.begin;
  chunk.count = static_cast<unsigned int>(rest < size ? rest : size);
  return chunk;
}

// The same number, of which the compiler does not know that it is: what was computed from it is computed again.
__device__ __forceinline__ unsigned int anew(unsigned int number) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(number));
#endif
  return number;
}

// The elements of a chunk that are taken by packs: `packed` of them after the first `head`. Packs begin at multiples of
// their width in the tensor, so that they are aligned where the tensor is.
struct Split {
  unsigned int head, packed;
};

template <int width>
__device__ __forceinline__ unsigned int head_of(const Chunk& chunk) {
  return static_cast<unsigned int>(-chunk.begin) & (width - 1);
}

template <int width>
__device__ __forceinline__ Split split(const Chunk& chunk, bool aligned) {
  const unsigned int head = head_of<width>(chunk);
  if (!aligned || head >= chunk.count) return {0, 0};
  return {head, (chunk.count - head) / width * width};
}

// Computes what is the same for all elements of a tensor, where it differs from that of the `last` (-1: none). That
// costs integer powers, square roots and divisions in double: one thread does it. All threads read the same table and
// steps (none is written before every block is done), so they agree on whether to meet at the barriers.
template <typename Rule>
__device__ __forceinline__ void share_coefficients(typename Rule::Coefficients& shared, const Args& args,
                                                   const Table& table, long long tensor, long long last) {
  if (last >= 0 && (tensor == last || Rule::alike(table, last, tensor))) return;
  __syncthreads();  // nobody still reads the last ones
  if (threadIdx.x == 0) shared = Rule::coefficients(args, table, tensor);
  __syncthreads();
}

// Registers for the blocks that are launched on a multiprocessor: see rule.h.
template <typename Rule>
constexpr int kBlocks = launch_of(sizeof(typename Rule::T) == 8).blocks_per_multiprocessor;

// True, in all threads, for the one block that comes here last: it sees all that the others did before. The ticket goes
// back to zero by itself, ready for the next launch. Every thread of every block must come here.
__device__ __forceinline__ bool is_last_block(long long* ticket) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // what this block did, before its ticket
    last = atomicInc(reinterpret_cast<unsigned int*>(ticket), gridDim.x - 1) == gridDim.x - 1;
    __threadfence();  // the other blocks' tickets, before what this block does next
  }
  __syncthreads();
  return last;
}

}  // namespace fastcurv
