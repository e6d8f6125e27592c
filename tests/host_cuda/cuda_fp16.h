// Host stand-in for <cuda_fp16.h>: the conversions, through common/dtype.h.
#pragma once

#include "common/dtype.h"

using __half = pyfast_dpo::Float16;

inline __half __float2half_rn(float x) { return pyfast_dpo::narrow<pyfast_dpo::Float16>(x); }
inline float __half2float(__half x) { return pyfast_dpo::widen(x); }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
