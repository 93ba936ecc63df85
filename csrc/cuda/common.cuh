// What the multi-tensor device kernels share. nvcc, NVRTC (which has no standard header) and the host emulator of
// tests/cuda_host compile this text, so it includes nothing but headers that are like it.
#pragma once
#include "table.h"

namespace fastcurv {

// `width` neighbouring elements. With 16 bytes or more of them, aligned so, each copy is a row of 16-byte accesses.
template <typename T, int width>
struct alignas(sizeof(T) * width < 16 ? sizeof(T) * width : 16) Pack {
  T values[width];
};

// How many elements the narrower of two types puts into 16 bytes.
template <typename A, typename B>
constexpr int kPackWidth = 16 / (sizeof(A) < sizeof(B) ? sizeof(A) : sizeof(B));

template <int width, typename T>
__device__ __forceinline__ Pack<T, width> load_pack(const T* pointer) {
  return *reinterpret_cast<const Pack<T, width>*>(pointer);
}

template <int width, typename T>
__device__ __forceinline__ void store_pack(T* pointer, const Pack<T, width>& pack) {
  *reinterpret_cast<Pack<T, width>*>(pointer) = pack;
}

// Whether all addresses are multiples of 16.
template <typename... Pointers>
__device__ __forceinline__ bool aligned16(Pointers... pointers) {
  return ((reinterpret_cast<unsigned long long>(pointers) | ...) & 15) == 0;
}

// Element `begin` of a tensor in one of the lists. Without the assumption the compiler takes an address out of the
// table for one that may as well lie in shared memory: slower generic accesses, and no value kept across a store.
template <typename T>
__device__ __forceinline__ T* list_pointer(const Table& table, long long tensor, int list, long long begin = 0) {
  T* pointer = table.pointer<T>(tensor, list) + begin;
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

// Elements begin .. begin + count - 1 of a tensor. Positions in a tensor are 64-bit. Those in a chunk are
// 32-bit, and unsigned, which saves the sign extensions; a chunk has less than 2^30 elements. It has a multiple of
// 2048, so that a chunk is aligned where its tensor is.
struct Chunk {
  long long tensor;
  long long begin;
  unsigned int count;
};

__device__ __forceinline__ Chunk chunk_at(const Table& table, long long index) {
  const unsigned long long word = table.chunk(index);
  const long long size = table.chunk_elements();
  Chunk chunk;
  chunk.tensor = static_cast<long long>(word >> 32);
  chunk.begin = static_cast<long long>(word & 0xffffffffu) * size;
  const long long rest = table.numel(chunk.tensor) - chunk.begin;
  chunk.count = static_cast<unsigned int>(rest < size ? rest : size);
  return chunk;
}

// A compile-time number that can be an argument.
template <int n>
struct Width {
  static constexpr int value = n;
};

// Shares the `count` elements of a chunk out among the threads of a block. start() gives the chunk's pointers, a type
// with aligned() and +=; body(Width<n>{}, at) does n elements from `at` on: `width` of them, or one where no whole pack
// is left or the memory is not aligned for packs. start() is asked again before those, because pointers that were kept
// through the first loop would cost it ten registers.
template <int width, typename Start, typename Body>
__device__ __forceinline__ void for_each_pack(unsigned int count, const Start& start, const Body& body) {
  auto at = start();
  const unsigned int packed = at.aligned() ? count - count % width : 0;
  const unsigned int stride = blockDim.x * width;
  at += threadIdx.x * width;
  for (unsigned int i = threadIdx.x * width; i < packed; i += stride, at += stride) body(Width<width>{}, at);
  if (packed == count) return;

  at = start();
  at += packed + threadIdx.x;
  for (unsigned int i = packed + threadIdx.x; i < count; i += blockDim.x, at += blockDim.x) body(Width<1>{}, at);
}

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

// Adds 1 to the step count of every tensor, empty ones included. Every thread of every block ends with this call: the
// counts change only when no block has any left to read.
__device__ __forceinline__ void advance_steps(long long* words, int step_list) {
  if (!is_last_block(words + kTicket)) return;
  const Table table{words};
  for (long long t = threadIdx.x; t < table.tensors(); t += blockDim.x) {
    *list_pointer<float>(table, t, step_list) += 1.0f;
  }
}

}  // namespace fastcurv
