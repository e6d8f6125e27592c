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
  using Pair = __nv_bfloat162;
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
  using Pair = __half2;
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

// The largest element of some vectors; NaN are passed over, as by fmax. Halves two at a time,
// before they are widened.
template <class T, int kCount>
__device__ __forceinline__ StatT<T> max_of(const uint4 (&raw)[kCount]) {
  if constexpr (sizeof(T) == 2) {
    using Pair = typename Element<T>::Pair;
    const auto pair = [](unsigned word) {
      Pair both;
      memcpy(&both, &word, sizeof(both));
      return both;
    };
    Pair pairs[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      pairs[i] =
          __hmax2(__hmax2(pair(raw[i].x), pair(raw[i].y)), __hmax2(pair(raw[i].z), pair(raw[i].w)));
    }
#pragma unroll
    for (int i = 1; i < kCount; ++i) pairs[0] = __hmax2(pairs[0], pairs[i]);
    T both[2];
    memcpy(both, pairs, sizeof(both));
    return fmax(Element<T>::widen(both[0]), Element<T>::widen(both[1]));
  } else {
    StatT<T> top = -StatT<T>(INFINITY);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      StatT<T> z[kLanes<T>];
      unpack<T>(raw[i], z);
#pragma unroll
      for (int k = 0; k < kLanes<T>; ++k) top = fmax(top, z[k]);
    }
    return top;
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

// Where the vectors of a row lie: on 16-byte boundaries, or kWords words (0 to 3) after one and,
// for halves, perhaps two bytes more. Known at compile time, a shift costs no selects.
constexpr int kAligned = -1;

// A whole vector of a row. Off the boundary it is cut out of two aligned loads (the second hits the
// cache line that the neighbouring thread reads), which read at most 15 bytes of what lies on
// either side: only where at least a vector of the row does.
template <int kWords, class T>
__device__ __forceinline__ uint4 load_vector(const T* address) {
  if constexpr (kWords == kAligned) {
    return __ldcs(reinterpret_cast<const uint4*>(address));
  } else {
    const int shift = misalignment(address);
    const uint4* aligned =
        reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(address) - shift);
    const uint4 low = __ldcs(aligned), high = __ldcs(aligned + 1);
    const unsigned words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    unsigned out[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[i] = sizeof(T) >= 4 ? words[kWords + i]
                              : __funnelshift_r(words[kWords + i], words[kWords + i + 1],
                                                static_cast<unsigned>(shift % 4) * 8);
    }
    return make_uint4(out[0], out[1], out[2], out[3]);
  }
}

template <int kWords>
struct Alignment {
  static constexpr int words = kWords;
};

// function(Alignment<...>{}) for where `address` lies.
template <class T, class Function>
__device__ __forceinline__ auto dispatch_alignment(const T* address, const Function& function) {
  const int shift = misalignment(address);
  if (shift == 0) return function(Alignment<kAligned>{});
  if constexpr (sizeof(T) < 8) {
    if (shift / 4 == 1) return function(Alignment<1>{});
    if (shift / 4 == 3) return function(Alignment<3>{});
  }
  if constexpr (sizeof(T) < 4) {
    if (shift / 4 == 0) return function(Alignment<0>{});
  }
  return function(Alignment<2>{});
}

// A vector that adds nothing to a sum of exponentials: -inf everywhere.
template <class T>
__device__ __forceinline__ uint4 nothing() {
  StatT<T> values[kLanes<T>];
#pragma unroll
  for (int k = 0; k < kLanes<T>; ++k) values[k] = -StatT<T>(INFINITY);
  return pack<T>(values);
}

// Puts -inf in a lane of a vector (kLanes: in none). By words: an array that is indexed at run time
// is in local memory.
template <class T>
__device__ __forceinline__ uint4 without_lane(uint4 raw, int lane) {
  const uint4 none = nothing<T>();
  const auto word = [&](unsigned kept, unsigned cut, int index) {
    if constexpr (sizeof(T) == 2) {
      const unsigned mask = lane / 2 != index ? 0u : lane % 2 == 0 ? 0x0000ffffu : 0xffff0000u;
      return (kept & ~mask) | (cut & mask);
    } else {
      return index * 4 / static_cast<int>(sizeof(T)) == lane ? cut : kept;
    }
  };
  return make_uint4(word(raw.x, none.x, 0), word(raw.y, none.y, 1), word(raw.z, none.z, 2),
                    word(raw.w, none.w, 3));
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
