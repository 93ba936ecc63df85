// Sums over rows: a warp for each segment, in the order of table.h.
#pragma once
#include "update.cuh"

namespace fastcurv {

template <typename Rule, typename All = typename MakeIndices<Rule::kLists>::type>
struct Sum;

template <typename Rule, int... l>
struct Sum<Rule, Indices<l...>> {
  using T = typename Rule::T;
  using Coefficients = typename Rule::Coefficients;

  template <bool taken, bool staged, typename Storage>
  static __device__ __forceinline__ T value(const Storage* list, const typename Rule::Param* stage, long long i) {
    if constexpr (taken && staged) {
      return load(stage[i]);
    } else if constexpr (taken) {
      return load(list[i]);
    } else {
      return T(0);
    }
  }
  template <bool taken, typename Storage>
  static __device__ __forceinline__ void set_value(Storage* list, long long i, T value) {
    if constexpr (taken) store(list[i], value);
  }

  template <unsigned int staged>
  static __device__ __forceinline__ void add_element(const Coefficients& c, double* sums, long long i,
                                                     const typename Rule::Param* stage, Stored<Rule, l>*... lists) {
    double terms[Rule::kSums];
    T x[] = {value<has(Rule::kFirstReads, l), has(staged, l)>(lists, stage, i)...};
    Rule::first(c, x, terms);
#pragma unroll
    for (int k = 0; k < Rule::kSums; ++k) sums[k] += terms[k];
    (set_value<has(Rule::kFirstWrites, l)>(lists, i, x[l]), ...);
  }

  // Adds elements begin + lane, begin + lane + width, ... of a chunk up to `end`.
  template <unsigned int staged>
  static __device__ __forceinline__ void add_elements(const Coefficients& c, double* sums, const Table& table,
                                                      const Chunk& chunk, const typename Rule::Param* stage,
                                                      unsigned int begin, unsigned int end, unsigned int width) {
#pragma unroll 4
    for (unsigned int i = begin; i < end; i += width) {
      add_element<staged>(c, sums, i, stage,
                          Update<Rule>::template list<Rule::kFirstReads & ~staged, l>(table, chunk)...);
    }
  }

  // The sums over a segment of a row whose runs are apart, in lane 0.
  static __device__ __forceinline__ void scattered_segment(const Coefficients& c, double* sums, const Table& table,
                                                           long long tensor, const Rows& rows, long long row,
                                                           long long begin, long long count, unsigned int lane) {
    // A step of 32 elements as one of so many runs and elements: no division in the loop.
    const long long runs = kWarp / rows.inner, rest = kWarp % rows.inner;
    long long run = (begin + lane) / rows.inner, at = (begin + lane) % rows.inner;
    const Chunk whole = {tensor, 0, 0};
#pragma unroll 4
    for (long long i = lane; i < count; i += kWarp) {
      add_element<0>(c, sums, (run * rows.count + row) * rows.inner + at, nullptr,
                     Update<Rule>::template list<Rule::kFirstReads, l>(table, whole)...);
      run += runs;
      at += rest;
      const bool over = at >= rows.inner;
      run += over ? 1 : 0;
      at -= over ? rows.inner : 0;
    }
  }

  static __device__ __forceinline__ void copy_list(typename Rule::Param* stage, const Chunk& chunk,
                                                   const typename Rule::Param* list) {
    constexpr int kWidth = Update<Rule>::kWidth;
    const Split parts = split<kWidth>(chunk, aligned16(list + head_of<kWidth>(chunk)));
#pragma unroll 4
    for (unsigned int i = threadIdx.x * kWidth; i < parts.packed; i += blockDim.x * kWidth) {
      store_pack<kWidth>(stage + parts.head + i, load_pack<kWidth>(list + parts.head + i));
    }
    for (unsigned int j = threadIdx.x; j < chunk.count - parts.packed; j += blockDim.x) {
      const unsigned int i = j < parts.head ? j : j + parts.packed;
      stage[i] = list[i];
    }
  }
};

// Shared memory of a block for a chunk of whole rows.
template <typename Rule>
struct Tile {
  static constexpr bool kStages = kStagedList<Rule> != 0;
  static constexpr int kWidth = Update<Rule>::kWidth;
  static constexpr int kSegments = kLocalRow / kSegment;

  alignas(16) typename Rule::Param elements[kStages ? kTile + kWidth : kWidth];
  typename Rule::Row rows[kTileRows];
  double segments[kSegments][Rule::kSums];

  // Where element 0 of a chunk is, so that packs are as aligned here as in the tensor.
  __device__ __forceinline__ typename Rule::Param* stage(const Chunk& chunk) {
    return elements + (static_cast<unsigned int>(chunk.begin) & (kWidth - 1));
  }
};

// Takes the sums over the rows of a chunk and leaves what they make of each row in the tile.
//
// Segments are shared out among the warps in equal stretches. Of each 32, every lane keeps the sums of one: row() then
// runs in all lanes. Rows of 16 elements or less leave lanes empty: several are summed at the same time.
template <typename Rule, unsigned int staged>
__device__ __forceinline__ void sum_tile(Tile<Rule>& tile, const typename Rule::Coefficients& c, const Table& table,
                                         const Chunk& chunk, unsigned int length) {
  const unsigned int rows = chunk.count / length;
  const unsigned int segments = (length + kSegment - 1) / kSegment, all = rows * segments;
  const unsigned int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp, share = (all + warps - 1) / warps;
  const unsigned int begin = threadIdx.x / kWarp * share, end = begin + share < all ? begin + share : all;
  const long long first_row = chunk.begin / length;
  unsigned int width = kWarp;  // lanes for a segment
  while (width / 2 >= length) width /= 2;
  const unsigned int together = kWarp / width;

  for (unsigned int batch = begin; batch < end; batch += kWarp) {
    double mine[Rule::kSums] = {};
    for (unsigned int turn = 0; turn < width && batch + turn * together < end; ++turn) {
      const unsigned int segment = batch + turn * together + lane / width;
      double sums[Rule::kSums] = {};
      if (segment < end) {
        const unsigned int row = segment / segments, from = segment % segments * kSegment;
        const unsigned int to = length - from < kSegment ? length : from + static_cast<unsigned int>(kSegment);
        Sum<Rule>::template add_elements<staged>(c, sums, table, chunk, tile.stage(chunk),
                                                 row * length + from + lane % width, row * length + to, width);
      }
      add_lanes<Rule::kSums>(sums, width);
#pragma unroll
      for (int k = 0; k < Rule::kSums; ++k) {
        const double sum = __shfl_sync(kWholeWarp, sums[k], static_cast<int>(lane % together * width));
        mine[k] = lane / together == turn ? sum : mine[k];
      }
    }
    const unsigned int number = batch + lane;
    if (number >= end) continue;
    if (segments == 1) {
      tile.rows[number] = Rule::row(c, mine, length, table, chunk.tensor, first_row + number);
    } else {
#pragma unroll
      for (int k = 0; k < Rule::kSums; ++k) tile.segments[number][k] = mine[k];
    }
  }
  if (segments > 1) {
    __syncthreads();
    if (threadIdx.x < rows) {  // at most three
      double (*sums)[Rule::kSums] = tile.segments + threadIdx.x * segments;
      for (unsigned int w = Tile<Rule>::kSegments / 2; w > 0; w /= 2) {
        for (unsigned int j = 0; j < w && j + w < segments; ++j) {
#pragma unroll
          for (int k = 0; k < Rule::kSums; ++k) sums[j][k] += sums[j + w][k];
        }
      }
      tile.rows[threadIdx.x] = Rule::row(c, sums[0], length, table, chunk.tensor, first_row + threadIdx.x);
    }
  }
}

// The first pass over a chunk of whole rows.
template <typename Rule>
__device__ __forceinline__ void prepare_tile(Tile<Rule>& tile, const typename Rule::Coefficients& c, const Table& table,
                                             const Chunk& chunk, unsigned int length) {
  constexpr unsigned int staged = kStagedList<Rule>;
  __syncthreads();  // nobody still reads the last tile
  if (staged && chunk.count <= kTile) {
    Sum<Rule>::copy_list(tile.stage(chunk), chunk,
                         table.pointer<typename Rule::Param>(chunk.tensor, only_list(staged)) + chunk.begin);
    __syncthreads();
    sum_tile<Rule, staged>(tile, c, table, chunk, length);
  } else {
    sum_tile<Rule, 0>(tile, c, table, chunk, length);
  }
  __syncthreads();
}

}  // namespace fastcurv
