// Moving averages of second moments, M <- decay M + scale X^T X, at half the flops of a product where M is symmetric.
//
// Some hundred rows of X at a time are brought into strips. Only that has to know what X is: a matrix or patches of
// images, of whatever storage, with a one behind each row or not.
#include <algorithm>
#include <vector>

#include "../fastcurv.h"
#include "simd.h"
#include "teams.h"
#include "tiles.h"

namespace fastcurv {
namespace {

constexpr long long kDepth = 512;  // rows of X at a time

template <typename Real>
struct Room {
  Buffer<Real> sums, x, y;
  bool is_finite = true;

  Room(long long rows, long long columns, bool has_other)
      : sums(padded_rows<Real>(rows) * padded_stride<Real>(columns)),
        x(padded_rows<Real>(rows) * kDepth),
        y(has_other ? padded_rows<Real>(columns) * kDepth : 0) {}
};

// Brings rows first, ..., first + depth - 1 of the samples into strips.
template <typename Real, typename Storage, Simd kLevel>
struct Pack {
  static constexpr long long kStrip = Tiles<Real, kLevel>::kStrip;

  static FC_INLINE void run(const Samples* samples, bool has_ones, long long padded, long long first, long long depth,
                            Real* to, const Team* given) {
    const Samples& x = *samples;
    const Team& team = *given;
    const Storage* const values = static_cast<const Storage*>(x.values);
    for (long long j = team.rank * kStrip; j < padded; j += team.size * kStrip) {
      Real* const strip = to + j * depth;
      const long long inside = std::clamp(x.columns - j, 0ll, kStrip);
      for (long long c = inside; c < kStrip; ++c) {
        const Real fill = has_ones && j + c == x.columns ? Real(1) : Real(0);
        for (long long k = 0; k < depth; ++k) strip[k * kStrip + c] = fill;
      }
      if (x.patches.channels) {
        for (long long c = 0; c < inside; ++c) pack_patches(x.patches, values, j + c, first, depth, strip + c);
        continue;
      }
      for (long long k = 0; k < depth; ++k) {
        const Storage* const row = values + (first + k) * x.columns + j;
        Real* const at = strip + k * kStrip;
        if (inside == kStrip) {  // of known length
          for (long long c = 0; c < kStrip; ++c) at[c] = static_cast<Real>(load(row[c]));
        } else {
          for (long long c = 0; c < inside; ++c) at[c] = static_cast<Real>(load(row[c]));
        }
      }
    }
  }

 private:
  // One column of the patches: what one weight of the convolution sees.
  static FC_INLINE void pack_patches(const Patches& p, const Storage* images, long long column, long long first,
                                     long long depth, Real* to) {
    const long long x_of = column % p.kernel[1], y_of = column / p.kernel[1] % p.kernel[0];
    const long long channel = column / (p.kernel[0] * p.kernel[1]);
    long long ox = first % p.outputs[1], oy = first / p.outputs[1] % p.outputs[0];
    long long image = first / p.outputs[1] / p.outputs[0];
    for (long long k = 0; k < depth;) {
      const long long y = oy * p.stride[0] - p.padding[0] + y_of * p.dilation[0];
      const bool is_row = y >= 0 && y < p.height;
      const Storage* const row = images + (is_row ? ((image * p.channels + channel) * p.height + y) * p.width : 0);
      const long long end = std::min(depth, k + p.outputs[1] - ox);
      for (long long x = ox * p.stride[1] - p.padding[1] + x_of * p.dilation[1]; k < end; ++k, x += p.stride[1]) {
        to[k * kStrip] = is_row && x >= 0 && x < p.width ? static_cast<Real>(load(row[x])) : Real(0);
      }
      ox = 0;
      if (++oy == p.outputs[0]) oy = 0, ++image;
    }
  }
};

template <typename Real>
using PackFunction = void (*)(const Samples*, bool, long long, long long, long long, Real*, const Team*);

// Sums are in Real, the factor in Out. A function reads the samples, so that products are compiled once for all
// storages.
template <typename Real, typename Out, Simd kLevel>
struct KronFactor {
  using T = Tiles<Real, kLevel>;

  static FC_INLINE void run(const Statistic* statistic, PackFunction<Real> pack, Room<Real>* room, const Team* team) {
    const Statistic& s = *statistic;
    const long long rows = padded_rows<Real>(s.rows()), columns = padded_rows<Real>(s.columns());
    const long long stride = padded_stride<Real>(s.columns());
    const bool is_symmetric = s.is_symmetric();
    Real *const sums = room->sums.begin(), *const x = room->x.begin(), *const y = room->y.begin();
    for (long long i = team->rank; i < rows; i += team->size) std::fill_n(sums + i * stride, columns, Real());
    for (long long first = 0; first < s.count; first += kDepth) {
      const long long depth = std::min(kDepth, s.count - first);
      pack(&s.x, s.has_ones, rows, first, depth, x, team);
      if (!is_symmetric) pack(&s.y, s.has_ones, columns, first, depth, y, team);
      team->wait();
      if (is_symmetric) {
        T::add_triangle(0, rows, depth, x, sums, stride, *team, [](long long) { return Real(1); });
      } else {
        T::add_rectangle(rows, columns, depth, x, y, sums, stride, *team);
      }
      team->wait();
    }
    if (team->rank == 0) room->is_finite = all_finite(s, sums, stride);
    team->wait();
    if (room->is_finite) add(s, sums, stride, *team);
    team->wait();  // before the room is another's
    if (team->rank > 0) return;
    *s.info = room->is_finite ? 0 : kNotFinite;
    double trace = 0.0;
    const Out* const factor = static_cast<const Out*>(s.factor);
    for (long long i = 0; is_symmetric && i < s.rows(); ++i) trace += factor[i * s.rows() + i];
    *s.trace = trace;
  }

 private:
  // Where sums are squares, those on the diagonal are the largest but for rounding, which doubling them covers.
  static FC_INLINE bool all_finite(const Statistic& s, const Real* sums, long long stride) {
    const Real scale = static_cast<Real>(s.scale);
    bool is_finite = true;
    for (long long i = 0; i < s.rows(); ++i) {
      const long long begin = s.is_symmetric() ? i : 0, end = s.is_symmetric() ? i + 1 : s.columns();
      for (long long j = begin; j < end; ++j) {
        const Out sum = static_cast<Out>(scale * (2 * sums[i * stride + j]));
        is_finite = is_finite && sum - sum == 0;
      }
    }
    return is_finite;
  }

  static FC_INLINE void add(const Statistic& s, const Real* sums, long long stride, const Team& team) {
    const long long columns = s.columns();
    const Real decay = static_cast<Real>(s.decay), scale = static_cast<Real>(s.scale);
    Out* const factor = static_cast<Out*>(s.factor);
    constexpr long long kBlock = 16;
    for (long long top = team.rank * kBlock; top < s.rows(); top += team.size * kBlock) {
      const long long bottom = std::min(s.rows(), top + kBlock);
      for (long long i = top; i < bottom; ++i) {
        Out* const row = factor + i * columns;
        const Real* const from = sums + i * stride;
        const long long end = s.is_symmetric() ? i + 1 : columns;
        if (decay == 0) {  // whatever stood there
          for (long long j = 0; j < end; ++j) row[j] = static_cast<Out>(scale * from[j]);
        } else {
          for (long long j = 0; j < end; ++j) {
            row[j] = static_cast<Out>(decay * static_cast<Real>(row[j]) + scale * from[j]);
          }
        }
      }
      if (!s.is_symmetric()) continue;
      mirror_rows(factor, columns, top, bottom, factor, columns);
    }
  }
};

template <typename Real, typename Storage>
void run_list(const std::vector<Statistic>& statistics) {
  using Out = typename Compute<Storage>::type;
  const PackFunction<Real> pack =
      Clones<Pack<Real, Storage, Simd::baseline>, Pack<Real, Storage, Simd::v3>, Pack<Real, Storage, Simd::v4>>::
          template select<const Samples*, bool, long long, long long, long long, Real*, const Team*>();
  const auto function = Clones<KronFactor<Real, Out, Simd::baseline>, KronFactor<Real, Out, Simd::v3>,
                               KronFactor<Real, Out, Simd::v4>>::template select<const Statistic*, PackFunction<Real>,
                                                                                 Room<Real>*, const Team*>();
  std::vector<double> costs;
  for (const Statistic& s : statistics) {
    costs.push_back(static_cast<double>(s.count) * s.rows() * s.columns() * (s.is_symmetric() ? 1 : 2));
  }
  on_teams(
      costs,
      [&](const std::vector<size_t>& numbers, int) {
        long long rows = 0, columns = 0;
        bool has_other = false;
        for (size_t number : numbers) {
          rows = std::max(rows, statistics[number].rows());
          columns = std::max(columns, statistics[number].columns());
          has_other = has_other || !statistics[number].is_symmetric();
        }
        return Room<Real>(rows, columns, has_other);
      },
      [&](size_t number, Room<Real>& room, const Team& team) { function(&statistics[number], pack, &room, &team); });
}

template <typename Real>
void run_storage(const std::vector<Statistic>& statistics, Dtype samples) {
  switch (samples) {
    case Dtype::bfloat16: return run_list<Real, bfloat16>(statistics);
    case Dtype::float16: return run_list<Real, float16>(statistics);
    default: return run_list<Real, float>(statistics);
  }
}

}  // namespace

void kron_factor_cpu(const std::vector<Statistic>& statistics, Dtype samples, Dtype sums) {
  if (samples == Dtype::float64) return run_list<double, double>(statistics);
  sums == Dtype::float64 ? run_storage<double>(statistics, samples) : run_storage<float>(statistics, samples);
}

}  // namespace fastcurv
