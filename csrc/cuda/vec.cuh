// Elements of a row, and 16 bytes of them at a time from any address.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>

#include <cstdint>
#include <cstring>

#include "common/dtype.h"

namespace pyfast_dpo::cuda {

// 2^x, one instruction, 2 ulp, results below 2^-126 flushed to 0. Without .ftz it costs three more
// instructions an element, only for probabilities below 1e-38.
__device__ __forceinline__ float exp2_approx(float x) {
#if defined(__CUDACC__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return host_cuda::exp2_approx(x);
#endif
}

// exp for half types, whose inputs carry 8 or 11 bits.
__device__ __forceinline__ float exp_approx(float x) {
  return exp2_approx(x * 1.44269504088896340736f);
}

// What the kernels need to know of an element type: conversions to and from its statistics, and the
// exponential that is exact enough for it.
template <class T>
struct Element;

template <>
struct Element<double> {
  using Stat = double;
  static __device__ __forceinline__ double widen(double x) { return x; }
  static __device__ __forceinline__ double narrow(double x) { return x; }
  static __device__ __forceinline__ double exp(double x) { return ::exp(x); }
};

template <>
struct Element<float> {
  using Stat = float;
  static __device__ __forceinline__ float widen(float x) { return x; }
  static __device__ __forceinline__ float narrow(float x) { return x; }
  static __device__ __forceinline__ float exp(float x) { return ::expf(x); }
};

template <>
struct Element<BFloat16> {
  using Stat = float;
  static __device__ __forceinline__ float widen(BFloat16 x) {
    return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
  }
  static __device__ __forceinline__ BFloat16 narrow(float x) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
  }
  static __device__ __forceinline__ float exp(float x) { return exp_approx(x); }
};

template <>
struct Element<Float16> {
  using Stat = float;
  static __device__ __forceinline__ float widen(Float16 x) {
    return __half2float(__ushort_as_half(x.bits));
  }
  static __device__ __forceinline__ Float16 narrow(float x) {
    return {__half_as_ushort(__float2half_rn(x))};
  }
  static __device__ __forceinline__ float exp(float x) { return exp_approx(x); }
};

template <class T>
using StatT = typename Element<T>::Stat;

// Elements of T in 16 bytes.
template <class T>
constexpr int kLanes = 16 / static_cast<int>(sizeof(T));

template <class T>
__device__ __forceinline__ void unpack(uint4 raw, StatT<T> (&out)[kLanes<T>]) {
  T elements[kLanes<T>];
  memcpy(elements, &raw, sizeof(raw));
#pragma unroll
  for (int k = 0; k < kLanes<T>; ++k) out[k] = Element<T>::widen(elements[k]);
}

// By words: a shift and a mask, where the compiler would extract 16 bits and shift them.
template <>
__device__ __forceinline__ void unpack<BFloat16>(uint4 raw, float (&out)[8]) {
  const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    out[2 * k] = __uint_as_float(words[k] << 16);
    out[2 * k + 1] = __uint_as_float(words[k] & 0xffff0000u);
  }
}

template <class T>
__device__ __forceinline__ uint4 pack(const StatT<T> (&in)[kLanes<T>]) {
  T elements[kLanes<T>];
#pragma unroll
  for (int k = 0; k < kLanes<T>; ++k) elements[k] = Element<T>::narrow(in[k]);
  uint4 raw;
  memcpy(&raw, elements, sizeof(raw));
  return raw;
}

__device__ __forceinline__ int misalignment(const void* address) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(address) & 15);
}

// 16 bytes from an address that is not 16-byte aligned: two aligned loads (the second hits the
// cache line that the neighbouring thread reads) and a shift. Reads at most 15 bytes either side.
__device__ __forceinline__ uint4 load_shifted(const void* address) {
  const int shift = misalignment(address);
  const uint4* aligned = reinterpret_cast<const uint4*>(static_cast<const char*>(address) - shift);
  uint4 low = __ldcs(aligned), high = __ldcs(aligned + 1);
  if (shift & 8) {
    low = make_uint4(low.z, low.w, high.x, high.y);
    high.x = high.z;
    high.y = high.w;
  }
  if (shift & 4) {
    low = make_uint4(low.y, low.z, low.w, high.x);
    high.x = high.y;
  }
  const int bits = (shift & 3) * 8;
  return make_uint4(__funnelshift_r(low.x, low.y, bits), __funnelshift_r(low.y, low.z, bits),
                    __funnelshift_r(low.z, low.w, bits), __funnelshift_r(low.w, high.x, bits));
}

// A whole vector of a row. Not aligned: only where at least a vector of the row lies on either
// side.
template <bool kAligned, class T>
__device__ __forceinline__ uint4 load_vector(const T* address) {
  return kAligned ? __ldcs(reinterpret_cast<const uint4*>(address)) : load_shifted(address);
}

// Elements [first, first + kLanes) of row[0, size), one by one: for the ends of a row. Positions
// past the end come as -inf, which adds nothing to a sum of exponentials.
template <class T>
__device__ __forceinline__ uint4 load_elements(const T* row, int64_t first, int64_t size) {
  T elements[kLanes<T>];
#pragma unroll
  for (int k = 0; k < kLanes<T>; ++k) {
    elements[k] = Element<T>::narrow(-StatT<T>(INFINITY));
    if (first + k < size) elements[k] = row[first + k];
  }
  uint4 raw;
  memcpy(&raw, elements, sizeof(raw));
  return raw;
}

}  // namespace pyfast_dpo::cuda
