#include "simd.h"

#include <cstdlib>
#include <cstring>

#include "../fastcurv.h"

namespace fastcurv {

namespace {
Simd detect() {
  const char* wanted = std::getenv("FASTCURV_SIMD");
  if (wanted && std::strcmp(wanted, "default") == 0) return Simd::baseline;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return Simd::v4;
  if (__builtin_cpu_supports("x86-64-v3")) return Simd::v3;
#endif
  return Simd::baseline;
}
}  // namespace

Simd simd() {
  static const Simd level = detect();
  return level;
}

const char* simd_level() {
  static const char* const names[] = {"default", "x86-64-v3", "x86-64-v4"};
  return names[static_cast<int>(simd())];
}

}  // namespace fastcurv
