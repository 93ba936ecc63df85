#include "simd.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>

#include "../fastcurv.h"

namespace fastcurv {

namespace {
const char* const kNames[] = {"default", "x86-64-v3", "x86-64-v4"};

Simd detect() {
  Simd most = Simd::v4;  // that is wanted
  const char* variable = std::getenv("FASTCURV_SIMD");
  if (const std::string wanted = variable ? variable : ""; !wanted.empty()) {
    const auto name = std::find(std::begin(kNames), std::end(kNames), wanted);
    if (name == std::end(kNames)) {
      throw std::invalid_argument(
          "FASTCURV_SIMD='" + wanted +
          "': expected default, x86-64-v3 or x86-64-v4; unset, it is the best of this processor");
    }
    most = static_cast<Simd>(name - kNames);
  }
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (most >= Simd::v4 && __builtin_cpu_supports("x86-64-v4")) return Simd::v4;
  if (most >= Simd::v3 && __builtin_cpu_supports("x86-64-v3")) return Simd::v3;
#endif
  return Simd::baseline;
}
}  // namespace

Simd simd() {
  static const Simd level = detect();
  return level;
}

const char* simd_level() { return kNames[static_cast<int>(simd())]; }

}  // namespace fastcurv
