// Host stand-in for <cuda_bf16.h>: the conversions, through common/dtype.h.
#pragma once

#include <math.h>

#include "common/dtype.h"

using __nv_bfloat16 = pyfast_dpo::BFloat16;

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  return pyfast_dpo::narrow<pyfast_dpo::BFloat16>(x);
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }

struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline __nv_bfloat162 __hmax2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return {__float2bfloat16_rn(fmaxf(widen(a.x), widen(b.x))),
          __float2bfloat16_rn(fmaxf(widen(a.y), widen(b.y)))};
}
