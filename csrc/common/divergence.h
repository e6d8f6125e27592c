// f-divergences (Wang et al. 2023, "Beyond reverse KL"): a pair loss sees phi(x) = f'(e^x) of a
// log-ratio x instead of x, up to a constant.
//     reverse KL      x
//     Jensen-Shannon  log 2 + log sigmoid(x)
//     alpha           (e^((alpha - 1) x) - 1) / (alpha - 1); alpha = 0 is forward KL, 1 - e^-x, and
//                     alpha -> 1 reverse KL
// The alpha family leaves the range of float where |x| is 88 / |alpha - 1| and more; there the
// difference is infinite with the right sign, and 0 for equal responses, but not NaN.
#pragma once

#include "common/macros.h"
#include "common/math.h"
#include "common/params.h"

namespace pyfast_dpo {

template <class T>
struct Score {
  T value, slope;
};

template <class T>
PFD_HD inline Score<T> divergence_score(T x, const PairLossParams& p) {
  if (p.divergence == Divergence::kReverseKl) return {x, T(1)};
  if (p.divergence == Divergence::kJensenShannon) return {-softplus(-x), sigmoid(-x)};
  const T rate = T(p.divergence_alpha - 1);
  return {expm1(rate * x) / rate, exp(rate * x)};
}

template <class T>
struct ScoreDifference {
  T value, d_chosen, d_rejected;
};

// phi(chosen) / chosen_length - phi(rejected) / rejected_length, or with average_first
// phi(chosen / chosen_length) - phi(rejected / rejected_length).
template <class T>
PFD_HD inline ScoreDifference<T> score_difference(T chosen, T rejected, T chosen_length,
                                                  T rejected_length, const PairLossParams& p) {
  const T chosen_after = p.average_first ? T(1) : chosen_length;
  const T rejected_after = p.average_first ? T(1) : rejected_length;
  const T x_chosen = p.average_first ? chosen / chosen_length : chosen;
  const T x_rejected = p.average_first ? rejected / rejected_length : rejected;
  const Score<T> c = divergence_score(x_chosen, p), r = divergence_score(x_rejected, p);
  const T left = c.value / chosen_after, right = r.value / rejected_after;
  T value = left - right;
  if (p.divergence == Divergence::kJensenShannon && chosen_after != rejected_after) {
    value += T(0.693147180559945309) * (T(1) / chosen_after - T(1) / rejected_after);
  } else if (p.divergence == Divergence::kAlpha && left == right && left - left != T(0)) {
    // Both infinite: the larger exponential decides.
    const T rate = T(p.divergence_alpha - 1);
    const T lead = rate * (x_chosen - x_rejected) - (log(chosen_after) - log(rejected_after));
    value = lead > T(0) ? left : (lead < T(0) ? -left : lead);
  }
  return {value, c.slope / chosen_length, -r.slope / rejected_length};
}

}  // namespace pyfast_dpo
