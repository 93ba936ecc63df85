// The kernels of every multi-tensor op: its rule (../rule.h) over a table (../table.h). Any grid is right, one block
// included, also for a table without chunks. Floor: bytes over memory bandwidth.
#pragma once
#include "sums.cuh"
#include "update.cuh"

namespace fastcurv {

// Of tensors whose rows are long or not contiguous: the sums over their segments.
template <typename Rule>
__global__ void __launch_bounds__(kThreads, kBlocks<Rule>) partials_kernel(Args args) {
  if (args.skips()) return;
  const Table table = args.table();
  const unsigned int lane = threadIdx.x % kWarp;
  __shared__ typename Rule::Coefficients shared;
  for (unsigned int index = blockIdx.x; index < table.partials(); index += gridDim.x) {
    const unsigned long long word = table.partial(index);
    const long long tensor = tensor_of(word);
    share_coefficients<Rule>(shared, args, table, tensor,
                             index == blockIdx.x ? -1 : tensor_of(table.partial(index - gridDim.x)));
    const typename Rule::Coefficients c = shared;
    const Rows rows = table.rows(tensor);
    const long long segments = rows.segments(), group = number_of(word) * kGroup;
    for (long long s = group + threadIdx.x / kWarp; s < group + kGroup; s += blockDim.x / kWarp) {
      if (s >= rows.count * segments) break;
      const long long row = s / segments, segment = s % segments, begin = segment * kSegment;
      const long long count = rows.length - begin < kSegment ? rows.length - begin : kSegment;
      double sums[Rule::kSums] = {};
      if (rows.inner == rows.length) {
        const Chunk chunk = {tensor, row * rows.length + begin, static_cast<unsigned int>(count)};
        Sum<Rule>::template add_elements<0>(c, sums, table, chunk, nullptr, lane, chunk.count, kWarp);
      } else {
        Sum<Rule>::scattered_segment(c, sums, table, tensor, rows, row, begin, count, lane);
      }
      add_lanes<Rule::kSums>(sums, kWarp);
      if (lane == 0) {
        double* scratch = table.segment_scratch(rows, row, segment);
#pragma unroll
        for (int k = 0; k < Rule::kSums; ++k) scratch[k] = sums[k];
      }
    }
  }
}

// Then what they make of each row, in the warp of its first segment.
template <typename Rule>
__global__ void __launch_bounds__(kThreads, kBlocks<Rule>) rows_kernel(Args args) {
  if (args.skips()) return;
  const Table table = args.table();
  const unsigned int lane = threadIdx.x % kWarp;
  __shared__ typename Rule::Coefficients shared;
  for (unsigned int index = blockIdx.x; index < table.partials(); index += gridDim.x) {
    const unsigned long long word = table.partial(index);
    const long long tensor = tensor_of(word);
    share_coefficients<Rule>(shared, args, table, tensor,
                             index == blockIdx.x ? -1 : tensor_of(table.partial(index - gridDim.x)));
    const Rows rows = table.rows(tensor);
    const long long segments = rows.segments(), group = number_of(word) * kGroup;
    for (long long s = group + threadIdx.x / kWarp; s < group + kGroup; s += blockDim.x / kWarp) {
      if (s >= rows.count * segments) break;
      const long long row = s / segments;
      if (s % segments) continue;
      const double* scratch = table.segment_scratch(rows, row, 0);
      double sums[Rule::kSums] = {};
#pragma unroll 8
      for (long long segment = lane; segment < segments; segment += kWarp) {
#pragma unroll
        for (int k = 0; k < Rule::kSums; ++k) sums[k] += scratch[segment * kRowWords + k];
      }
      add_lanes<Rule::kSums>(sums, kWarp);
      if (lane == 0) {
        static_assert(sizeof(typename Rule::Row) <= kRowWords * sizeof(double), "a row must fit into its scratch");
        *reinterpret_cast<typename Rule::Row*>(table.row_scratch(rows, row)) =
            Rule::row(shared, sums, rows.length, table, tensor, row);
      }
    }
  }
}

// Then all the rest, and the sums over other rows, chunk by chunk.
template <typename Rule>
__global__ void __launch_bounds__(kThreads, kBlocks<Rule>) update_kernel(Args args) {
  if (args.skips()) return;  // all threads alike, and before any ticket is drawn
  const Table table = args.table();
  __shared__ typename Rule::Coefficients shared;

  for (unsigned int index = blockIdx.x; index < table.chunks(); index += gridDim.x) {
    const Chunk chunk = chunk_at<Rule>(table, index);
    share_coefficients<Rule>(shared, args, table, chunk.tensor,
                             index == blockIdx.x ? -1 : tensor_of(table.chunk(index - gridDim.x)));
    OneRow<Rule> one = {Rule::no_row(shared)};
    bool is_first = Rule::kSums > 0;
    if constexpr (Rule::kSums > 0) {
      const Rows rows = table.rows(chunk.tensor);
      if (rows.local()) {
        __shared__ Tile<Rule> tile;
        prepare_tile(tile, shared, table, chunk, static_cast<unsigned int>(rows.length));
        if (chunk.count <= kTile) {
          const TileRows<Rule> several = {tile.rows, tile.stage(chunk), static_cast<unsigned int>(rows.length)};
          const typename Rule::Coefficients c = shared;
          update_chunk<Rule, false>(c, table, index, several);
          continue;
        }
        one = {tile.rows[0]};
        is_first = false;
      } else if (rows.count) {
        const ScratchRows<Rule> several(table, rows, chunk.begin);
        if (!several.is_one(chunk.count)) {
          const typename Rule::Coefficients c = shared;
          update_chunk<Rule, false>(c, table, index, several);
          continue;
        }
        one = {several.row(several.first)};
        is_first = false;
      }
    }
    const typename Rule::Coefficients c = shared;
    if constexpr (Rule::kFirstWrites != 0) {
      if (is_first) {
        update_chunk<Rule, true>(c, table, index, one);
        continue;
      }
    }
    update_chunk<Rule, false>(c, table, index, one);
  }

  // Steps change only when no block has any left to read. Those of empty tensors too.
  if (!is_last_block(table.words + kTicket)) return;
  for (long long t = threadIdx.x; t < table.tensors(); t += blockDim.x) Rule::advance(args, table, t);
}

}  // namespace fastcurv
