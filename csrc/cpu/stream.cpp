// The memory traffic of an elementwise op without its arithmetic: the ceiling that benchmarks measure the op against.
// Goes through the same table, split among the threads in the same way. Values stay what they are, so that it can run
// over the very buffers of the op: written lists are combined by exclusive or with a zero the compiler does not know.
#include <atomic>
#include <cstdint>

#include "../fastcurv.h"
#include "parallel.h"
#include "simd.h"

namespace fastcurv {
namespace {

struct RewriteLoop {
  static FC_INLINE void run(unsigned char* __restrict bytes, unsigned char mask, long long count) {
    for (long long i = 0; i < count; ++i) bytes[i] ^= mask;
  }
};

struct ReadLoop {
  static FC_INLINE void run(const unsigned char* __restrict bytes, unsigned char* __restrict digest, long long count) {
    unsigned char sum = 0;
    for (long long i = 0; i < count; ++i) sum ^= bytes[i];
    *digest ^= sum;
  }
};

}  // namespace

int stream_cpu(long long* words, const std::vector<StreamList>& lists, long long block_elements) {
  static volatile unsigned char zero = 0;
  const unsigned char mask = zero;
  const auto rewrite = Clones<RewriteLoop>::select<unsigned char*, unsigned char, long long>();
  const auto read = Clones<ReadLoop>::select<const unsigned char*, unsigned char*, long long>();
  const Table table{words};
  std::atomic<unsigned char> digest{0};
  const auto elements = running_totals(table, [&](long long t) { return table.numel(t); });
#pragma omp parallel if (elements.back() > kSerialElements)
  for_my_share(elements, 0, table.tensors(), kRangeAlignment, [&](long long t, long long begin, long long end) {
    unsigned char sum = 0;
    for (long long i = begin; i < end; i += block_elements) {
      const long long count = std::min(block_elements, end - i);
      for (size_t l = 0; l < lists.size(); ++l) {
        const int size = lists[l].item_size;
        unsigned char* bytes = table.pointer<unsigned char>(t, static_cast<int>(l)) + i * size;
        if (lists[l].is_written) {
          rewrite(bytes, mask, count * size);
        } else {
          read(bytes, &sum, count * size);
        }
      }
    }
    digest ^= sum;
  });
  return digest;
}

}  // namespace fastcurv
