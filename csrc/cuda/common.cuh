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

// Whether all addresses are multiples of 16; a null pointer, the place of an absent list, counts as one.
template <typename... Pointers>
__device__ __forceinline__ bool aligned16(Pointers... pointers) {
  return ((reinterpret_cast<unsigned long long>(pointers) | ...) & 15) == 0;
}

struct Chunk {
  long long tensor;
  long long begin;  // first element, in the tensor; a multiple of the chunk size
  long long count;
};

__device__ __forceinline__ Chunk chunk_at(const Table& table, long long index) {
  const unsigned long long word = table.chunk(index);
  const long long size = table.chunk_elements();
  Chunk chunk;
  chunk.tensor = static_cast<long long>(word >> 32);
  chunk.begin = static_cast<long long>(word & 0xffffffffu) * size;
  const long long rest = table.numel(chunk.tensor) - chunk.begin;
  chunk.count = rest < size ? rest : size;
  return chunk;
}

// A compile-time number that can be an argument.
template <int n>
struct Width {
  static constexpr int value = n;
};

// Shares [0, count) out among the threads of a block: body(Width<width>{}, i) does the elements i .. i + width - 1, and
// body(Width<1>{}, i) one element where whole packs do not fit, or where the memory is not aligned for them.
template <int width, typename Body>
__device__ __forceinline__ void for_each_pack(long long count, bool aligned, const Body& body) {
  const long long packed = aligned ? count - count % width : 0;
  for (long long i = static_cast<long long>(threadIdx.x) * width; i < packed; i += blockDim.x * width) {
    body(Width<width>{}, i);
  }
  for (long long i = packed + threadIdx.x; i < count; i += blockDim.x) body(Width<1>{}, i);
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
  for (long long t = threadIdx.x; t < table.tensors(); t += blockDim.x) *table.pointer<float>(t, step_list) += 1.0f;
}

}  // namespace fastcurv
