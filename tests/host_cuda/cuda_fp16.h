// Host stand-in for <cuda_fp16.h>: the conversions, through common/dtype.h.
#pragma once

#include <math.h>

#include "common/dtype.h"

using __half = pyfast_dpo::Float16;

inline __half __float2half_rn(float x) { return pyfast_dpo::narrow<pyfast_dpo::Float16>(x); }
inline float __half2float(__half x) { return pyfast_dpo::widen(x); }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }

struct alignas(4) __half2 {
  __half x, y;
};
inline __half2 __hmax2(__half2 a, __half2 b) {
  return {__float2half_rn(fmaxf(__half2float(a.x), __half2float(b.x))),
          __float2half_rn(fmaxf(__half2float(a.y), __half2float(b.y)))};
}
