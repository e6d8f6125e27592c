// The loss table over arrays of one number a sequence. B is small: one thread, plain loops.
#include "common/losses.h"

#include "cpu/dispatch_stat.h"
#include "cpu/kernels.h"

namespace pyfast_dpo::cpu {
namespace {

// Calls visit(tag of T, i, outcome) for every pair.
template <class Visit>
void for_each_pair(const PairLossParams& p, Visit&& visit) {
  dispatch_stat(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    PairLosses::dispatch(p.loss, [&](auto loss) {
      for (int64_t i = 0; i < p.pairs; ++i) visit(tag, i, evaluate_pair<decltype(loss), T>(p, i));
    });
  });
}

template <class Visit>
void for_each_row(const UnpairedLossParams& p, Visit&& visit) {
  dispatch_stat(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T kl = *static_cast<const T*>(p.kl);
    UnpairedLosses::dispatch(p.loss, [&](auto loss) {
      for (int64_t i = 0; i < p.count; ++i) {
        const T logratio = static_cast<const T*>(p.policy)[i] - value_or<T>(p.reference, i, 0);
        visit(tag, i, logratio,
              decltype(loss)::template eval<T>(logratio, p.is_desirable[i], kl, p.params));
      }
    });
  });
}

}  // namespace

void pair_loss_forward(const PairLossParams& p) {
  for_each_pair(p, [&](auto tag, int64_t i, const auto& pair) {
    using T = typename decltype(tag)::type;
    static_cast<T*>(p.losses)[i] = pair.loss;
    static_cast<T*>(p.chosen_rewards)[i] = T(p.params.beta) * pair.chosen;
    static_cast<T*>(p.rejected_rewards)[i] = T(p.params.beta) * pair.rejected;
  });
}

void pair_loss_backward(const PairLossParams& p) {
  for_each_pair(p, [&](auto tag, int64_t i, const auto& pair) {
    using T = typename decltype(tag)::type;
    const T grad = static_cast<const T*>(p.grad_losses)[i];
    static_cast<T*>(p.grad_chosen)[i] = grad * pair.d_chosen;
    static_cast<T*>(p.grad_rejected)[i] = grad * pair.d_rejected;
  });
}

void unpaired_loss_forward(const UnpairedLossParams& p) {
  for_each_row(p, [&](auto tag, int64_t i, auto logratio, const auto& value) {
    using T = typename decltype(tag)::type;
    static_cast<T*>(p.losses)[i] = value.loss;
    static_cast<T*>(p.rewards)[i] = T(p.params.beta) * logratio;
  });
}

void unpaired_loss_backward(const UnpairedLossParams& p) {
  for_each_row(p, [&](auto tag, int64_t i, auto, const auto& value) {
    using T = typename decltype(tag)::type;
    static_cast<T*>(p.grad_policy)[i] = static_cast<const T*>(p.grad_losses)[i] * value.d_logratio;
  });
}

}  // namespace pyfast_dpo::cpu
