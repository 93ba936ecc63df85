// The list of kron_apply, what it says of each layer, and the argument of its device kernel.
#pragma once
#include "matrices.h"

namespace fastcurv {

// U = L V R, all row-major and contiguous. With inputs, V = gradients^T inputs / samples. With values, L and R are K2
// and K1 of a Stein equation: U = K2 [(K2^T V K1) / (1 + left_values right_values^T)] K1^T.
struct Layer {
  const void *grad, *left, *right;
  const void *inputs, *left_values, *right_values;  // null: none
  void* update;
  double* products;  // <V, U> and <U, U>
  int* info;
  long long rows, columns;  // of the update
  long long samples;        // 0 without inputs
};

// On a GPU: out_ij = scale * sum over k of x[i * x_row + k * x_depth] y[k * y_depth + j * y_column], divided by
// 1 + row_values_i column_values_j where there are those.
struct Product {
  const void *x, *y;
  void* out;  // null: nothing but its inner product is wanted
  const void* with;
  const void *row_values, *column_values;
  double* partials;  // of each tile, its inner product with `with` and, where it is stored, itself; null: none
  double scale;
  int rows, columns, depth, x_row, x_depth, y_depth, y_column;
  int first_tile;  // of the tiles of a launch
};

// The last step of a layer: its partial sums are added up.
struct Summed {
  const double* partials;
  void* update;
  double* products;
  int* info;
  long long numel, count;
};

constexpr int kProductsPerLaunch = 42, kSummedPerLaunch = 84;
constexpr int kProductTile = 64;
constexpr int kBlocksPerMultiprocessor = 2;
struct KronApplyArgs {
  long long count;  // of products, or of layers
  long long tiles;  // of all products; 0: layers are summed
  union {
    Product products[kProductsPerLaunch];
    Summed summed[kSummedPerLaunch];
  };
};
static_assert(sizeof(KronApplyArgs) <= 4096, "no more is passed to a kernel on every architecture");

constexpr long long tiles_along(long long n) { return (n + kProductTile - 1) / kProductTile; }

}  // namespace fastcurv
