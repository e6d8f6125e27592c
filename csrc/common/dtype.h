// Element types of logits, and the scalar conversions that need neither torch nor CUDA headers.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/macros.h"

namespace pyfast_dpo {

enum class DType : int32_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline double widen(double value) { return value; }
inline float widen(float value) { return value; }
inline float widen(BFloat16 value) {
  return bits_to_float(static_cast<uint32_t>(value.bits) << 16);
}

PFD_ALWAYS_INLINE float widen(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t exponent = (value.bits >> 10) & 0x1fu;
  const uint32_t mantissa = value.bits & 0x3ffu;
  if (exponent == 0x1fu) return bits_to_float(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24 is exact in float32
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return bits_to_float(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

// narrow<T>(x): round to nearest even, NaN stays NaN.
template <class T>
inline T narrow(double value);

template <>
inline double narrow<double>(double value) {
  return value;
}

template <>
inline float narrow<float>(double value) {
  return static_cast<float>(value);
}

template <>
inline BFloat16 narrow<BFloat16>(double value) {
  const uint32_t bits = float_to_bits(static_cast<float>(value));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
PFD_ALWAYS_INLINE Float16 narrow<Float16>(double value) {
  const uint32_t bits = float_to_bits(static_cast<float>(value));
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u)
    return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds past 65504
  if (magnitude < 0x38800000u) {  // subnormal half: adding 0.5 aligns its last bit with float's
    const float aligned = bits_to_float(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (float_to_bits(aligned) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

// Statistics and results: float32, or float64 for float64 logits (DESIGN, numerics rule 1).
template <class T>
struct StatOf {
  using type = float;
};
template <>
struct StatOf<double> {
  using type = double;
};

template <class T>
struct TypeTag {
  using type = T;
};

// The one place where a runtime dtype becomes a type: dispatch_dtype(dtype, [&](auto tag) {...}).
template <class Function>
inline auto dispatch_dtype(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::kFloat64:
      return function(TypeTag<double>{});
    case DType::kBFloat16:
      return function(TypeTag<BFloat16>{});
    case DType::kFloat16:
      return function(TypeTag<Float16>{});
    case DType::kFloat32:
      break;
  }
  return function(TypeTag<float>{});
}

}  // namespace pyfast_dpo
