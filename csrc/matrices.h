// The lists of ops that do something with each matrix of a list, and the argument of their device kernels.
#pragma once
#include "numeric.h"

namespace fastcurv {

// Row-major and contiguous, in and out.
struct Matrix {
  const void* in;
  void* out;
  int* info;
  long long rows, columns;

  FC_INLINE bool is_wide() const { return rows <= columns; }
  FC_INLINE long long small() const { return is_wide() ? rows : columns; }
  FC_INLINE long long large() const { return is_wide() ? columns : rows; }
  // Position of entry (i, k) of the matrix, or of its transpose where that is wide.
  FC_INLINE long long at(long long i, long long k) const { return is_wide() ? i * columns + k : k * columns + i; }
};

// A Newton-Schulz step: singular values s become a s + b s^3 + c s^5.
struct Step {
  double a, b, c;
};

// What info says of a matrix: how many of its singular values, or rows, counted as zero; or
constexpr int kNotFinite = -2;  // it holds NaN or infinity, and the result is zero

// The argument of every device kernel on matrices, one block to a matrix. It travels with the launch: nothing is copied
// to the device before, and a CUDA graph keeps it.
constexpr int kMatricesPerLaunch = 64;
constexpr int kMostSteps = 40;
struct MatrixArgs {
  Matrix matrices[kMatricesPerLaunch];
  double
      floor;  // gram_schmidt: rows of a norm up to this count as zero; newton_schulz: norms below it are taken for it
  // newton_schulz: not 0 if matrices are divided by their largest singular values, and by the root of their longer side
  // over this length: singular values that count as zero by their sides then meet in one number.
  long long spectral;
  long long count;
  Step steps[kMostSteps];
};
static_assert(sizeof(MatrixArgs) <= 4096, "no more is passed to a kernel on every architecture");

constexpr int kMatrixThreads = 256;

// gram_schmidt: a row of length one of which another projection leaves no more than this was rounding of the first.
constexpr double kRounding = 0.1;
// And what counts as rounding of a row: the root of its length, or of this, times a half unit in the last place. One
// entry of a short row is rounded three times, and the length of what is projected on as well.
constexpr long long kLeastLength = 64;

// Newton-Schulz on a GPU: the side of the squares of entries that threads are laid out in, and what matrices it takes.
constexpr int kBlockSide = 16;
constexpr int kMostBlocks = 4;
constexpr long long kLargestSmall = kBlockSide * kMostBlocks;

// Doubles of a square matrix in shared memory, whose rows are an odd number of them apart, so that threads meet in a
// bank neither along rows nor along columns; and the bytes for three, with matrices of at most `small` rows.
constexpr int tile_size(int blocks) { return kBlockSide * blocks * (kBlockSide * blocks + 1); }
constexpr int newton_schulz_bytes(long long small) {
  return 3 * tile_size(static_cast<int>((small + kBlockSide - 1) / kBlockSide)) * static_cast<int>(sizeof(double));
}

// Bytes of shared memory that a block has on every architecture, if it asks, and without asking.
constexpr int kMostSharedBytes = 99 << 10;
constexpr int kSharedBytes = 48 << 10;
static_assert(newton_schulz_bytes(kLargestSmall) + 1024 <= kMostSharedBytes);

}  // namespace fastcurv
