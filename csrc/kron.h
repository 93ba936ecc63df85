// The lists of ops on Kronecker factors, what they say of each, and the argument of their device kernels.
#pragma once
#include "matrices.h"

namespace fastcurv {

// A symmetric matrix and its inverse, row-major and contiguous.
struct Factor {
  const void* in;
  const void* previous;  // what a matrix that has no inverse gets; null: zeros
  void* out;
  int* info;  // 0 before: it has its inverse already
  const double* damping;
  long long n;
};

// What info says afterwards: how many jitters it took, kNotFinite, or
constexpr int kNoInverse = -1;  // that none made it positive definite

// Added to the diagonal of what is not positive definite: this times the mean of the diagonal, then ten times as much.
constexpr double kJitter = 1e-6;
constexpr int kJitters = 3;

// What a convolution sees of images (images, channels, height, width): a row for each place of its kernel.
struct Patches {
  int channels, height, width, kernel[2], stride[2], padding[2], dilation[2], outputs[2];
};

// Rows of a row-major matrix (count, columns); or, where patches has channels, of the patches of contiguous images.
struct Samples {
  const void* values;
  long long columns;  // of a row, without the one
  Patches patches;
};

// On a GPU: the side of a tile of sums, samples that are worth a block, and how many blocks a matrix is worth.
constexpr int kSumTile = 64;
constexpr long long kLeastSamples = 256, kMostSumBlocks = 256;
constexpr long long kTileSums = kSumTile * kSumTile;

// factor = decay factor + scale X^T Y, with a one behind each row of X and Y if has_ones; Y is X where it has no
// values, and the factor then symmetric.
struct Statistic {
  Samples x, y;
  void* factor;
  void* work;     // on a GPU: work_elements() of what is summed in
  double* trace;  // of what it has become; 0 where it is not symmetric
  int* info;      // 0, or kNotFinite: it has stayed what it was. On a GPU 0 before
  long long count;
  double decay, scale;
  int has_ones;

  FC_INLINE bool is_symmetric() const { return !y.values; }
  FC_INLINE long long rows() const { return x.columns + has_ones; }
  FC_INLINE long long columns() const { return is_symmetric() ? rows() : y.columns + has_ones; }

  // On a GPU: tiles of sums, of which a symmetric matrix has those on and below the diagonal; blocks that share the
  // samples of a tile; and what they leave behind: the diagonal as it was, and each block's sums.
  static constexpr FC_INLINE long long tiles_along(long long n) { return n ? (n + kSumTile - 1) / kSumTile : 1; }
  FC_INLINE long long tiles() const {
    const long long down = tiles_along(rows());
    return is_symmetric() ? down * (down + 1) / 2 : down * tiles_along(columns());
  }
  FC_INLINE long long splits() const {
    const long long by_tiles = kMostSumBlocks / tiles(), by_samples = count / kLeastSamples;
    const long long most = by_tiles < by_samples ? by_tiles : by_samples;
    return most > 1 ? most : 1;
  }
  FC_INLINE long long diagonal() const { return is_symmetric() ? tiles_along(rows()) * kSumTile : 0; }
  FC_INLINE long long work_elements() const { return diagonal() + tiles() * splits() * kTileSums; }
};

// The argument of the device kernels of kron_factor.
constexpr int kStatisticsPerLaunch = 16;
struct StatisticArgs {
  Statistic statistics[kStatisticsPerLaunch];
  long long count;
};
static_assert(sizeof(StatisticArgs) <= 4096, "no more is passed to a kernel on every architecture");

// kron_root: Newton's iteration starts from min(p + 1, this) / (2 ||A||) times A. With more, high powers would make
// large eigenvalues vanish.
constexpr long long kNewtonStart = 5;

struct KronArgs {
  Factor factors[kMatricesPerLaunch];
  long long p;  // kron_root: of which root
};
static_assert(sizeof(KronArgs) <= 4096, "no more is passed to a kernel on every architecture");

// On a GPU: rows of a block, the side of a tile, and for matrices of how many rows shared memory holds so many of them.
constexpr int kFactorRows = 32, kFewRows = 4;
constexpr int kFactorTile = 64;
constexpr long long padded_tile(long long n) { return (n + kFactorTile - 1) / kFactorTile * kFactorTile; }
constexpr int kFactorBytes = 80 << 10;
static_assert(kFactorBytes + 2 * 8 * kFactorRows * (kFactorRows + 1) + 1024 <= kMostSharedBytes);
constexpr long long most_rows(long long rows, long long item_size) {
  return kFactorBytes / (rows * item_size) / kFactorTile * kFactorTile;
}
constexpr int kron_inverse_bytes(long long n, long long item_size) {
  return static_cast<int>((n <= most_rows(kFactorRows, item_size) ? kFactorRows : kFewRows) * padded_tile(n) *
                          item_size);
}

}  // namespace fastcurv
