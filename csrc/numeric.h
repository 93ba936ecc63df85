// Storage formats and exact double-precision helpers, shared by the host compiler, nvcc, NVRTC and the host emulator.
// Includes nothing: NVRTC has no <cstdint>, and one text for all of them is what makes the back ends agree bit for bit.
#pragma once

#if defined(__CUDACC__)
#define FC_INLINE __host__ __device__ __forceinline__
#else
#define FC_INLINE inline __attribute__((always_inline))
#endif

namespace fastcurv {

enum class Dtype : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

// 16-bit formats are kept as their bits and converted by integer operations: g++ 12 converts _Float16 one scalar at a
// time, while these loops vectorise in every clone and round the same way on host and device.
struct bfloat16 {
  unsigned short bits;
};
struct float16 {
  unsigned short bits;
};

#if defined(__CUDA_ARCH__)
FC_INLINE float bits_to_float(unsigned int bits) { return __uint_as_float(bits); }
FC_INLINE unsigned int float_to_bits(float value) { return __float_as_uint(value); }
FC_INLINE float square_root(float x) { return sqrtf(x); }
FC_INLINE double square_root(double x) { return sqrt(x); }
#else
FC_INLINE float bits_to_float(unsigned int bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
FC_INLINE unsigned int float_to_bits(float value) {
  unsigned int bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}
FC_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
FC_INLINE double square_root(double x) { return __builtin_sqrt(x); }
#endif

FC_INLINE float load(float x) { return x; }
FC_INLINE double load(double x) { return x; }
FC_INLINE float load(bfloat16 x) { return bits_to_float(static_cast<unsigned int>(x.bits) << 16); }

FC_INLINE float load(float16 x) {
  const unsigned int shifted = (static_cast<unsigned int>(x.bits) & 0x7fffu) << 13;
  const unsigned int exponent = shifted & 0x0f800000u;
  const unsigned int normal = shifted + 0x38000000u;
  const unsigned int special = shifted + 0x70000000u;
  // A subnormal half becomes a normal float: build 2^-14 * (1 + fraction) and take 2^-14 off. Subtracting, unlike
  // scaling a subnormal float, gives the same value when the thread flushes subnormals to zero.
  const float subnormal = bits_to_float(shifted + 0x38800000u) - bits_to_float(0x38800000u);
  unsigned int bits = exponent == 0x0f800000u ? special : normal;
  bits = exponent == 0u ? float_to_bits(subnormal) : bits;
  return bits_to_float(bits | ((static_cast<unsigned int>(x.bits) & 0x8000u) << 16));
}

FC_INLINE void store(float& out, float x) { out = x; }
FC_INLINE void store(double& out, double x) { out = x; }

FC_INLINE void store(bfloat16& out, float x) {  // round to nearest even
  const unsigned int bits = float_to_bits(x);
  const unsigned int high = bits >> 16;
  const unsigned int rounded = (bits + 0x7fffu + (high & 1u)) >> 16;
  out.bits = static_cast<unsigned short>(x != x ? high | 0x0040u : rounded);
}

FC_INLINE void store(float16& out, float x) {  // round to nearest even
  const unsigned int bits = float_to_bits(x);
  const unsigned int sign = (bits >> 16) & 0x8000u;
  const unsigned int magnitude = bits & 0x7fffffffu;
  const unsigned int odd = (magnitude >> 13) & 1u;
  const unsigned int normal = (magnitude - 0x38000000u + 0x0fffu + odd) >> 13;
  // Below 2^-14 the float adder does the rounding: the sum with 0.5 holds the half's fraction in its last bits.
  const unsigned int subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  unsigned int half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x47800000u ? 0x7c00u : half;  // 65536 and above; the carry of `normal` makes 65520 infinite
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  out.bits = static_cast<unsigned short>(half | sign);
}

// Arithmetic is float for every storage format but double.
template <typename Storage>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};

FC_INLINE float maximum(float a, float b) { return a != a || a > b ? a : b; }  // NaN wins, as in torch.maximum
FC_INLINE double maximum(double a, double b) { return a != a || a > b ? a : b; }

// 1 - beta^exponent for beta in [0, 1), by repeated squaring of the complement: with a = 1 - x and b = 1 - y, 1 - x y
// is a + b (1 - a), and no term cancels. Accurate to a few ulp however small the result is, where 1 - pow(beta, t) is
// not; and only IEEE operations, so that host, device and Triton get the same bits, which no two libraries' pow
// promises.
FC_INLINE double one_minus_power(double beta, long long exponent) {
  double result = 0.0;
  double power = 1.0 - beta;  // the complement of beta^(2^k)
  while (exponent > 0) {
    result = (exponent & 1) ? result + power * (1.0 - result) : result;
    power = power * (2.0 - power);
    exponent >>= 1;
  }
  return result;
}

}  // namespace fastcurv
