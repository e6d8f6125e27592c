// Scalar functions of the losses, stable for every finite argument, for CPU, CUDA and tests.
#pragma once

#include <math.h>  // not <cmath>: unqualified calls need the float overloads too

#include "common/macros.h"

namespace pyfast_dpo {

// log(1 + e^x). Exactly ln 2 at 0; x for large x; e^x (never 0 before e^x underflows) for very
// negative x.
template <class T>
PFD_HD inline T softplus(T x) {
  return x > T(0) ? x + log1p(exp(-x)) : log1p(exp(x));
}

// 1 / (1 + e^-x) without overflow on either side.
template <class T>
PFD_HD inline T sigmoid(T x) {
  const T e = exp(x > T(0) ? -x : x);
  return x > T(0) ? T(1) / (T(1) + e) : e / (T(1) + e);
}

// log(e^x - 1) for x > 0, without overflow and without cancellation.
template <class T>
PFD_HD inline T log_expm1(T x) {
  return x < T(1) ? log(expm1(x)) : x + log1p(-exp(-x));
}

// a * b with 0 * inf = 0: what has vanished times what overflows. NaN stays NaN.
template <class T>
PFD_HD inline T scaled(T a, T b) {
  const T product = a * b;
  return product == product || a != a || b != b ? product : T(0);
}

}  // namespace pyfast_dpo
