#include "simd.h"

#include <cstdlib>
#include <cstring>

#include "../fastcurv.h"

namespace fastcurv {

namespace {
const char* const kNames[] = {"default", "x86-64-v3", "x86-64-v4"};

Simd detect() {
  Simd most = Simd::v4;  // that is wanted
  if (const char* wanted = std::getenv("FASTCURV_SIMD")) {
    for (int level = 0; level < 3; ++level) {
      if (std::strcmp(wanted, kNames[level]) == 0) most = static_cast<Simd>(level);
    }
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
