// Gradients times inverses of Kronecker products, for layers of any sizes, in float or double.
//
// Every product is X^T Y of strips (tiles.h). Blocks of kDepth rows of X and Y are packed once and stay in the cache
// while all tiles of the result take their share: a tile loads one vector of Y and broadcasts kTall elements of X for
// kTall fused multiply-adds. Orders are chosen so that what comes out of a product is packed for the next as it lies:
// the first one of each form gives its transpose.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../fastcurv.h"
#include "simd.h"
#include "teams.h"
#include "tiles.h"

namespace fastcurv {
namespace {

constexpr long long kDepth = 128;
constexpr int kGrids = 4;

template <typename Real>
constexpr long long grid_elements(long long rows, long long columns) {
  return padded_rows<Real>(rows) * padded_stride<Real>(columns);
}

// What the threads that do a layer share: packed blocks of both operands, padded results, and sums of strips of rows.
template <typename Real>
struct Room {
  static constexpr long long kLeastStrip = 4;

  long long strips = 0, packed = 0, elements[kGrids] = {};
  Buffer<Real> x{0}, y{0};
  std::vector<Buffer<Real>> grids;
  std::vector<double> sums;
  bool is_finite = false;

  explicit Room(const std::vector<Layer>& layers, const std::vector<size_t>& numbers) {
    for (size_t number : numbers) {
      const Layer& l = layers[number];
      const long long m = l.samples, d = l.rows, a = l.columns;
      packed = std::max(packed, padded_rows<Real>(std::max({d, a, m})));
      strips = std::max(strips, (d + kLeastStrip - 1) / kLeastStrip + (m + kLeastStrip - 1) / kLeastStrip);
      hold(0, m ? grid_elements<Real>(m, std::max(d, m)) : grid_elements<Real>(a, d));
      hold(1, m ? grid_elements<Real>(m, a) : grid_elements<Real>(d, a));
      hold(2, m ? grid_elements<Real>(d, a) : 0);
      hold(3, m ? grid_elements<Real>(m, m) : 0);
    }
    x = Buffer<Real>(kDepth * packed);
    y = Buffer<Real>(kDepth * packed);
    for (long long n : elements) grids.emplace_back(n);
    sums.resize(2 * strips);
  }

 private:
  void hold(int grid, long long n) { elements[grid] = std::max(elements[grid], n); }
};

template <typename Real, Simd kLevel>
struct KronApply {
  using T = Tiles<Real, kLevel>;
  static constexpr long long kStrip = T::kStrip;
  static_assert(kStrip >= Room<Real>::kLeastStrip && (64 / sizeof(Real)) % kStrip == 0);
  static constexpr long long kFew = 8;
  using Few __attribute__((vector_size(kFew * sizeof(Real)), aligned(sizeof(Real)), may_alias)) = Real;
  using FewDoubles __attribute__((vector_size(kFew * sizeof(double)))) = double;

  // Element (k, i) is at from[k * down + i * across]; one of the two is 1.
  struct Operand {
    const Real* from;
    long long down, across;
  };
  static FC_INLINE Operand direct(const void* from, long long stride) {
    return {static_cast<const Real*>(from), stride, 1};
  }
  static FC_INLINE Operand transposed(const void* from, long long stride) {
    return {static_cast<const Real*>(from), 1, stride};
  }

  // A result in the room, padded.
  struct Grid {
    Real* at;
    long long rows, columns, stride;

    FC_INLINE Operand direct() const { return {at, stride, 1}; }
    FC_INLINE Operand transposed() const { return {at, 1, stride}; }
  };

  static FC_INLINE void run(const Layer* layer, Room<Real>* room, const Team* team) {
    const Layer& l = *layer;
    const long long d = l.rows, a = l.columns, m = l.samples;
    const auto grid = [&](int number, long long rows, long long columns) {
      return Grid{room->grids[number].begin(), rows, columns, padded_stride<Real>(columns)};
    };
    Sums sums = {room->sums.data(), room->sums.data() + 2 * strips(d), 1.0};
    if (m) {
      const Real scale = 1 / static_cast<Real>(m);
      const Operand g = transposed(l.grad, d), x = transposed(l.inputs, a);
      const Grid left = grid(0, m, d), right = grid(1, m, a), update = grid(2, d, a), gram = grid(3, m, m);
      multiply(d, g, transposed(l.left, d), left, *room, *team);
      multiply(a, x, direct(l.right, a), right, *room, *team);
      multiply(m, left.direct(), right.direct(), update, *room, *team);
      finish(update, scale, nullptr, 0, static_cast<Real*>(l.update), sums.of_update, *team);
      multiply(d, g, left.transposed(), gram, *room, *team);
      const Grid other = grid(0, m, m);
      multiply(a, x, right.transposed(), other, *room, *team);
      finish(other, scale, gram.at, gram.stride, nullptr, sums.of_samples, *team);
      sums.scale = scale;
    } else {
      const Operand v = direct(l.grad, a);
      const Grid turned = grid(0, a, d), update = grid(1, d, a);
      if (l.left_values) {
        multiply(d, v, direct(l.left, d), turned, *room, *team);
        multiply(a, turned.direct(), direct(l.right, a), update, *room, *team);
        divide(update, static_cast<const Real*>(l.left_values), static_cast<const Real*>(l.right_values), *team);
        team->wait();
        multiply(d, update.direct(), transposed(l.left, d), turned, *room, *team);
        multiply(a, turned.direct(), transposed(l.right, a), update, *room, *team);
      } else {
        multiply(d, v, transposed(l.left, d), turned, *room, *team);
        multiply(a, turned.direct(), direct(l.right, a), update, *room, *team);
      }
      finish(update, 1, v.from, a, static_cast<Real*>(l.update), sums.of_update, *team);
    }
    team->wait();
    conclude(l, sums, *room, *team);
  }

 private:
  // Of strips of rows: the inner product and the square.
  struct Sums {
    double *of_update, *of_samples;
    double scale;  // of the inner product
  };
  static constexpr FC_INLINE long long strips(long long rows) { return (rows + kStrip - 1) / kStrip; }

  // Operands and grids are passed by value: stores of vectors may alias what a pointer leads to, which is then read
  // again.

  // Rows k, ..., k + count - 1 of an operand in strips, with zeros behind its last column.
  struct Pack {
    static FC_INLINE void run(Operand o, long long k, long long count, long long columns, Real* to, Team team) {
      for (long long s = team.rank * kStrip; s < columns; s += team.size * kStrip) {
        const long long width = std::min(kStrip, columns - s);
        const Real* const from = o.from + k * o.down + s * o.across;
        Real* const strip = to + s * count;
        if (o.across == 1 && width == kStrip) {
          for (long long r = 0; r < count; ++r) {
            for (int v = 0; v < T::kVectors; ++v) {
              *T::at(strip + r * kStrip + v * T::kLanes) = *T::at(from + r * o.down + v * T::kLanes);
            }
          }
          continue;
        }
        if (width < kStrip) std::fill_n(strip, count * kStrip, Real());
        for (long long c = 0; c < width; ++c) {
          const Real* const column = from + c * o.across;
          if (o.down == 1) {
            for (long long r = 0; r < count; ++r) strip[r * kStrip + c] = column[r];
          } else {
            for (long long r = 0; r < count; ++r) strip[r * kStrip + c] = column[r * o.down];
          }
        }
      }
    }
  };

  // to = x^T y over `depth` rows. All see the result afterwards.
  struct Multiply {
    static FC_INLINE void run(long long depth, Operand x, Operand y, Grid to, const Room<Real>* room, Team team) {
      const long long rows = padded(to.rows, kStrip), columns = padded(to.columns, kStrip);
      for (long long s = team.rank * kStrip; s < rows; s += team.size * kStrip) {
        std::fill_n(to.at + s * to.stride, kStrip * to.stride, Real());
      }
      for (long long k = 0; k < depth; k += kDepth) {
        const long long count = std::min(kDepth, depth - k);
        call<kLevel, Pack>(x, k, count, to.rows, room->x.begin(), team);
        call<kLevel, Pack>(y, k, count, to.columns, room->y.begin(), team);
        team.wait();
        T::add_rectangle(rows, columns, count, room->x.begin(), room->y.begin(), to.at, to.stride, team);
        team.wait();
      }
    }
  };
  static FC_INLINE void multiply(long long depth, const Operand& x, const Operand& y, const Grid& to,
                                 const Room<Real>& room, const Team& team) {
    call<kLevel, Multiply>(depth, x, y, to, &room, team);
  }

  // By 1 + rows_i columns_j. An infinite value would make what it divides zero: NaN instead, which will be noticed.
  static FC_INLINE void divide(const Grid& grid, const Real* rows, const Real* columns, const Team& team) {
    constexpr Real nan = std::numeric_limits<Real>::quiet_NaN();
    for (long long s = team.rank * kStrip; s < grid.rows; s += team.size * kStrip) {
      for (long long i = s; i < std::min(s + kStrip, grid.rows); ++i) {
        Real* const row = grid.at + i * grid.stride;
        for (long long j = 0; j < grid.columns; ++j) {
          const Real divisor = 1 + rows[i] * columns[j];
          row[j] = divisor - divisor == 0 ? row[j] / divisor : nan;
        }
      }
    }
  }

  // A scaled grid: stores it, if there is where to, and of each strip of rows keeps the inner product with another
  // matrix, if there is one, and its square, if it is stored.
  struct Finish {
    static FC_INLINE void run(Grid grid, Real scale, const Real* with, long long with_stride, Real* out, double* sums,
                              Team team) {
      for (long long s = team.rank * kStrip; s < grid.rows; s += team.size * kStrip) {
        FewDoubles dots = {}, squares = {};
        double dot = 0.0, square = 0.0;
        for (long long i = s; i < std::min(s + kStrip, grid.rows); ++i) {
          const Real* const row = grid.at + i * grid.stride;
          const Real* const other = with ? with + i * with_stride : nullptr;
          Real* const to = out ? out + i * grid.columns : nullptr;
          long long j = 0;
          for (; j + kFew <= grid.columns; j += kFew) {
            const Few value = *reinterpret_cast<const Few*>(row + j) * scale;
            const FewDoubles wide = __builtin_convertvector(value, FewDoubles);
            if (to) {
              *reinterpret_cast<Few*>(to + j) = value;
              squares += wide * wide;
            }
            if (other) dots += wide * __builtin_convertvector(*reinterpret_cast<const Few*>(other + j), FewDoubles);
          }
          for (; j < grid.columns; ++j) {
            const Real value = row[j] * scale;
            if (to) {
              to[j] = value;
              square += static_cast<double>(value) * value;
            }
            if (other) dot += static_cast<double>(value) * other[j];
          }
        }
        for (long long l = 0; l < kFew; ++l) dot += dots[l], square += squares[l];
        sums[2 * (s / kStrip)] = dot;
        sums[2 * (s / kStrip) + 1] = square;
      }
    }
  };
  static FC_INLINE void finish(const Grid& grid, Real scale, const Real* with, long long with_stride, Real* out,
                               double* sums, const Team& team) {
    call<kLevel, Finish>(grid, scale, with, with_stride, out, sums, team);
  }

  // Adds up the sums, in the order of the strips. All threads have come here.
  static FC_INLINE void conclude(const Layer& l, const Sums& sums, Room<Real>& room, const Team& team) {
    if (team.rank == 0) {
      double dot = 0.0, square = 0.0;
      for (long long s = 0; s < strips(l.rows); ++s) dot += sums.of_update[2 * s], square += sums.of_update[2 * s + 1];
      for (long long s = 0; s < strips(l.samples); ++s) dot += sums.of_samples[2 * s];
      dot *= sums.scale;
      room.is_finite = dot - dot == 0 && square - square == 0;
      l.products[0] = room.is_finite ? dot : 0.0;
      l.products[1] = room.is_finite ? square : 0.0;
      *l.info = room.is_finite ? 0 : kNotFinite;
    }
    team.wait();
    if (!room.is_finite) {
      Real* const update = static_cast<Real*>(l.update);
      for (long long i = team.rank; i < l.rows; i += team.size) std::fill_n(update + i * l.columns, l.columns, Real());
    }
    team.wait();  // before it is written again
  }
};

double flops(const Layer& l) {
  const double d = static_cast<double>(l.rows), a = static_cast<double>(l.columns), m = static_cast<double>(l.samples);
  if (l.samples) return 2 * m * (d * d + a * a + d * a + m * (d + a));
  return (l.left_values ? 4 : 2) * d * a * (d + a);
}

template <typename Real>
void run_list(const std::vector<Layer>& layers) {
  const auto function = Clones<KronApply<Real, Simd::baseline>, KronApply<Real, Simd::v3>,
                               KronApply<Real, Simd::v4>>::template select<const Layer*, Room<Real>*, const Team*>();
  std::vector<double> costs;
  for (const Layer& layer : layers) costs.push_back(flops(layer));
  on_teams(
      costs, [&](const std::vector<size_t>& numbers, int) { return Room<Real>(layers, numbers); },
      [&](size_t number, Room<Real>& room, const Team& team) { function(&layers[number], &room, &team); });
}

}  // namespace

void kron_apply_cpu(const std::vector<Layer>& layers, Dtype dtype) {
  if (dtype == Dtype::float64) return run_list<double>(layers);
  run_list<float>(layers);
}

}  // namespace fastcurv
