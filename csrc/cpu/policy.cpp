// Policy losses over sequences of tokens, and advantages. A token takes nanoseconds: one thread.
#include "common/gae.h"
#include "common/losses.h"
#include "cpu/dispatch_stat.h"
#include "cpu/kernels.h"

namespace pyfast_dpo::cpu {
namespace {

template <class Loss, class T>
void policy_loss_of_sequence(const PolicyLossParams& p, int64_t sequence) {
  const Range range = tokens_of(p, sequence);
  double log_ratios = 0;
  int64_t scored = 0;
  for (int64_t t = range.first; t < range.last; ++t) {
    if (!is_scored(p, t)) continue;
    ++scored;
    log_ratios += Loss::kCorrectsRatio ? bounded_log_ratio_at<T>(p, t) : log_ratio_at<T>(p, t);
  }
  const double count = static_cast<double>(scored > 0 ? scored : 1);
  const T log_ratio = T(Loss::kOfSum ? log_ratios : log_ratios / count);
  const double weight = p.sequence_means ? 1 / count : 1;
  T* coefficients = static_cast<T*>(p.coefficients);
  double loss = 0, slopes = 0;
  for (int64_t t = range.first; t < range.last; ++t) {
    if (!is_scored(p, t)) {
      write_unscored_token<T>(p, t);
      continue;
    }
    const PolicyValue<T> value = evaluate_policy_token<Loss, T>(p, t, sequence, log_ratio);
    loss += value.loss;
    slopes += value.d_log_ratio;
    coefficients[t] = T(weight) * (value.d_logp + (p.sequence_level ? T(0) : value.d_log_ratio));
  }
  static_cast<T*>(p.sequence_losses)[sequence] = T(weight * loss);
  if (!p.sequence_level) return;
  const T shared = T(weight * (Loss::kOfSum ? slopes : slopes / count));
  for (int64_t t = range.first; t < range.last; ++t) {
    if (is_scored(p, t)) coefficients[t] += shared;
  }
}

}  // namespace

void policy_loss(const PolicyLossParams& p) {
  dispatch_stat(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    PolicyLosses::dispatch(p.loss, [&](auto loss) {
      for (int64_t s = 0; s < p.sequences; ++s) policy_loss_of_sequence<decltype(loss), T>(p, s);
    });
  });
}

void gae(const GaeParams& p) {
  dispatch_stat(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t row = 0; row < p.batch; ++row) gae_of_row<T>(p, row);
  });
}

}  // namespace pyfast_dpo::cpu
