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
