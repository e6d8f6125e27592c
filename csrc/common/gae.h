// Generalized advantage estimation of one row, from its end.
#pragma once

#include "common/macros.h"
#include "common/params.h"

namespace pyfast_dpo {

// A_t = r_t + gamma V_{t+1} - V_t + gamma lambda A_{t+1}, where an episode that is done has nothing
// after it. Steps that the mask leaves out get 0; value and advantage pass over them.
template <class T>
PFD_HD inline void gae_of_row(const GaeParams& p, int64_t row) {
  const T gamma = T(p.gamma), lam = T(p.lam);
  T next_value = p.last_values == nullptr ? T(0) : static_cast<const T*>(p.last_values)[row];
  T advantage = T(0);
  for (int64_t t = (row + 1) * p.length - 1; t >= row * p.length; --t) {
    T* out = static_cast<T*>(p.advantages) + t;
    if (p.mask != nullptr && !p.mask[t]) {
      *out = T(0);
      continue;
    }
    const T value = static_cast<const T*>(p.values)[t];
    if (p.dones != nullptr && p.dones[t]) next_value = advantage = T(0);
    const T error = static_cast<const T*>(p.rewards)[t] + gamma * next_value - value;
    advantage = error + gamma * lam * advantage;
    next_value = value;
    *out = advantage;
  }
}

}  // namespace pyfast_dpo
