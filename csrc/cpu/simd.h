// Function multiversioning that can be steered: the same loop compiled for several x86 levels, chosen once per process.
// (gcc's target_clones picks by the processor alone; FASTCURV_SIMD=default must be able to force the baseline.)
#pragma once

namespace fastcurv {

enum class Simd : int { baseline = 0, v3 = 1, v4 = 2 };

Simd simd();

#if defined(__x86_64__)
#define FC_TARGET(arch) __attribute__((target("arch=" arch)))
#else
#define FC_TARGET(arch)
#endif

// Only processors from before 2013 run the baseline of x86-64: correct and quick to compile is enough for it.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FC_BASELINE __attribute__((optimize("O1")))
#else
#define FC_BASELINE
#endif

// Of a lambda inside such a loop: without it, it may be compiled for the baseline.
#define FC_INLINED __attribute__((always_inline))

// Loop::run must be always_inline: its body is then compiled with the target of the wrapper it lands in. Loops may
// differ from level to level.
template <typename Loop, typename LoopV3 = Loop, typename LoopV4 = Loop>
struct Clones {
  template <typename... Args>
  FC_BASELINE static void baseline(Args... args) {
    Loop::run(args...);
  }
  template <typename... Args>
  FC_TARGET("x86-64-v3")
  static void v3(Args... args) {
    LoopV3::run(args...);
  }
  template <typename... Args>
  FC_TARGET("x86-64-v4")
  static void v4(Args... args) {
    LoopV4::run(args...);
  }

  template <typename... Args>
  static auto select() -> void (*)(Args...) {
    switch (simd()) {
      case Simd::v4: return v4<Args...>;
#ifndef __SANITIZE_ADDRESS__  // which makes a clone a matter of minutes
      case Simd::v3: return v3<Args...>;
#endif
      default: return baseline<Args...>;
    }
  }
};

// Calls the clone of a loop from another clone of the same level. Inlining would compile the loop again for each call.
template <Simd kLevel, typename Loop, typename... Args>
FC_INLINED inline void call(Args... args) {
  if constexpr (kLevel == Simd::v4) {
    Clones<Loop>::v4(args...);
  } else if constexpr (kLevel == Simd::v3) {
    Clones<Loop>::v3(args...);
  } else {
    Clones<Loop>::baseline(args...);
  }
}

}  // namespace fastcurv
