// Losses of a pair. chosen = log pi(y_w|x) - log ref(y_w|x), rejected likewise for y_l; log pi
// itself for a loss without reference; averages over the tokens for a loss that takes them.
//
// Two kinds:
//     losses of the difference  eval(chosen - rejected) -> {loss, slope}; a margin and an
//                               f-divergence act on the difference (divergence.h)
//     losses of both            eval(chosen, rejected)  -> {loss, d_chosen, d_rejected}
// evaluate_pair joins them with lengths, margins, shift and divergence; the CPU and CUDA kernels
// are loops over it.
#pragma once

#include <type_traits>

#include "common/divergence.h"
#include "common/macros.h"
#include "common/math.h"
#include "common/params.h"

namespace pyfast_dpo {

template <class T>
struct DifferenceValue {
  T loss, slope;
};

template <class T>
struct PairValue {
  T loss, d_chosen, d_rejected;
};

// Base classes that say which kind a struct is.
struct OfDifference {};
struct OfBoth {};

// --- losses of the difference: h = beta * difference --------------------------------------------

// DPO (Rafailov et al. 2023, eq. 7); label_smoothing e gives conservative DPO (Mitchell 2023):
//   -(1 - e) log sigmoid(h) - e log sigmoid(-h) = log(1 + e^-|h|) + (e if h > 0 else 1 - e) |h|.
// The right-hand form is exactly ln 2 at h = 0 for every e. An impossible response makes h
// infinite; e = 0 then leaves a loss of 0 or inf, not 0 * inf.
struct Sigmoid : OfDifference {
  static constexpr const char* name = "sigmoid";
  template <class T>
  PFD_HD static DifferenceValue<T> eval(T difference, const LossParams& params) {
    const T beta = T(params.beta), smoothing = T(params.label_smoothing);
    const T h = beta * difference;
    const T distance = h > T(0) ? h : -h;
    const T share = h > T(0) ? smoothing : T(1) - smoothing;
    const T linear = share > T(0) ? share * distance : T(0);
    return {log1p(exp(-distance)) + linear, beta * (smoothing - sigmoid(-h))};
  }
};

// Robust DPO (Chowdhury et al. 2024), unbiased under a share e of flipped preferences:
//   (-(1 - e) log sigmoid(h) + e log sigmoid(-h)) / (1 - 2 e)
//     = log(1 + e^-|h|) + (-e if h > 0 else 1 - e) |h| / (1 - 2 e).
struct Robust : OfDifference {
  static constexpr const char* name = "robust";
  template <class T>
  PFD_HD static DifferenceValue<T> eval(T difference, const LossParams& params) {
    const T beta = T(params.beta), smoothing = T(params.label_smoothing);
    const T h = beta * difference;
    const T distance = h > T(0) ? h : -h;
    const T share = (h > T(0) ? -smoothing : T(1) - smoothing) / (T(1) - T(2) * smoothing);
    const T linear = share == T(0) ? T(0) : share * distance;
    const T slope = -((T(1) - smoothing) * sigmoid(-h) + smoothing * sigmoid(h));
    return {log1p(exp(-distance)) + linear, beta * slope / (T(1) - T(2) * smoothing)};
  }
};

// Hinge, SLiC (Zhao et al. 2023; of log-ratios Liu et al. 2023): max(0, 1 - h).
struct Hinge : OfDifference {
  static constexpr const char* name = "hinge";
  template <class T>
  PFD_HD static DifferenceValue<T> eval(T difference, const LossParams& params) {
    const T beta = T(params.beta);
    const T gap = T(1) - beta * difference;
    if (gap <= T(0)) return {T(0), T(0)};
    return {gap, gap > T(0) ? -beta : gap};  // NaN stays NaN
  }
};

// IPO (Azar et al. 2023, eq. 17): (difference - 1 / (2 beta))^2.
struct Ipo : OfDifference {
  static constexpr const char* name = "ipo";
  template <class T>
  PFD_HD static DifferenceValue<T> eval(T difference, const LossParams& params) {
    const T distance = difference - T(0.5 / params.beta);
    return {distance * distance, T(2) * distance};
  }
};

// EXO for pairs (Ji et al. 2024, eq. 16): KL of (sigmoid(h), sigmoid(-h)) from (1 - e, e),
//   slope beta sigmoid(h) sigmoid(-h) (h - log((1 - e) / e)).
struct ExoPair : OfDifference {
  static constexpr const char* name = "exo_pair";
  template <class T>
  PFD_HD static DifferenceValue<T> eval(T difference, const LossParams& params) {
    const T beta = T(params.beta);
    const T log_win = T(log1p(-params.label_smoothing)), log_lose = T(log(params.label_smoothing));
    const T h = beta * difference;
    const T win = sigmoid(h), lose = sigmoid(-h);
    const T loss = scaled(win, -softplus(-h) - log_win) + scaled(lose, -softplus(h) - log_lose);
    return {loss, beta * scaled(win * lose, h - (log_win - log_lose))};
  }
};

// DiscoPOP, log-ratio modulated loss (Lu et al. 2024, eq. 5), m = sigmoid(h / tau):
//   -(1 - m) log sigmoid(h) + m e^-h.
// The second term is one exponential: e^-h alone overflows where m e^-h is small.
struct DiscoPop : OfDifference {
  static constexpr const char* name = "discopop";
  template <class T>
  PFD_HD static DifferenceValue<T> eval(T difference, const LossParams& params) {
    const T beta = T(params.beta), rate = T(1 / params.discopop_tau);
    const T h = beta * difference;
    const T modulation = sigmoid(rate * h), rest = sigmoid(-rate * h);
    const T logistic = softplus(-h);
    const T exponent =
        h > T(0) ? -h - softplus(-rate * h) : scaled(rate - T(1), h) - softplus(rate * h);
    const T exponential = exp(exponent);
    const T slope = -sigmoid(-h) * rest - scaled(rate * modulation * rest, logistic) +
                    exponential * (rate * rest - T(1));
    return {scaled(rest, logistic) + exponential, beta * slope};
  }
};

// --- losses of both -----------------------------------------------------------------------------

// NCA for pairs (Chen et al. 2024):
//   -log sigmoid(beta c) - 1/2 log sigmoid(-beta c) - 1/2 log sigmoid(-beta r).
struct NcaPair : OfBoth {
  static constexpr const char* name = "nca_pair";
  template <class T>
  PFD_HD static PairValue<T> eval(T chosen, T rejected, const LossParams& params) {
    const T beta = T(params.beta);
    const T c = beta * chosen, r = beta * rejected;
    return {softplus(-c) + T(0.5) * (softplus(c) + softplus(r)),
            beta * (T(0.5) * sigmoid(c) - sigmoid(-c)), T(0.5) * beta * sigmoid(r)};
  }
};

// BCO for pairs (Jung et al. 2024): -log sigmoid(beta c - shift) - log sigmoid(shift - beta
// r); evaluate_pair has taken the shift off both.
struct BcoPair : OfBoth {
  static constexpr const char* name = "bco_pair";
  template <class T>
  PFD_HD static PairValue<T> eval(T chosen, T rejected, const LossParams& params) {
    const T beta = T(params.beta);
    const T c = beta * chosen, r = beta * rejected;
    return {softplus(-c) + softplus(r), -beta * sigmoid(-c), beta * sigmoid(r)};
  }
};

// SPPO with hard labels (Wu et al. 2024, eq. 4.7 with P = 1 and 0):
//   (c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2.
struct SppoHard : OfBoth {
  static constexpr const char* name = "sppo_hard";
  template <class T>
  PFD_HD static PairValue<T> eval(T chosen, T rejected, const LossParams& params) {
    const T half = T(0.5 / params.beta);
    const T win = chosen - half, lose = rejected + half;
    return {win * win + lose * lose, T(2) * win, T(2) * lose};
  }
};

// APO-zero (D'Oosterlinck et al. 2024, eq. 7): sigmoid(-beta c) + sigmoid(beta r).
struct ApoZero : OfBoth {
  static constexpr const char* name = "apo_zero";
  template <class T>
  PFD_HD static PairValue<T> eval(T chosen, T rejected, const LossParams& params) {
    const T beta = T(params.beta);
    const T c = beta * chosen, r = beta * rejected;
    return {sigmoid(-c) + sigmoid(r), -beta * sigmoid(c) * sigmoid(-c),
            beta * sigmoid(r) * sigmoid(-r)};
  }
};

// APO-down (eq. 8): sigmoid(beta c) + sigmoid(-beta (c - r)).
struct ApoDown : OfBoth {
  static constexpr const char* name = "apo_down";
  template <class T>
  PFD_HD static PairValue<T> eval(T chosen, T rejected, const LossParams& params) {
    const T beta = T(params.beta);
    const T c = beta * chosen, h = beta * (chosen - rejected);
    const T pull = beta * sigmoid(h) * sigmoid(-h);
    return {sigmoid(c) + sigmoid(-h), beta * sigmoid(c) * sigmoid(-c) - pull, pull};
  }
};

// Negative log-likelihood of the chosen response.
struct Sft : OfBoth {
  static constexpr const char* name = "sft";
  template <class T>
  PFD_HD static PairValue<T> eval(T chosen, T, const LossParams&) {
    return {-chosen, T(-1), T(0)};
  }
};

// ORPO (Hong et al. 2024, eq. 6 and 7) of averaged log-probs, p = e^c, q = e^r, beta the paper's
// lambda: -c - beta log sigmoid(logit p - logit q). With logit p = -log(e^-c - 1) nothing cancels;
// the slopes of the second term are -1 / D and (1 - p) / ((1 - q) D), D = (1 - p) + (1 - q) p / q.
// A probability of 1, whose odds are infinite, counts as 1 less the smallest normal number.
struct Orpo : OfBoth {
  static constexpr const char* name = "orpo";
  template <class T>
  PFD_HD static PairValue<T> eval(T chosen, T rejected, const LossParams& params) {
    const T beta = T(params.beta);
    const T least =
        std::is_same<T, double>::value ? T(2.2250738585072014e-308) : T(1.17549435e-38f);
    const T c = chosen > -least ? -least : chosen, r = rejected > -least ? -least : rejected;
    const T improbable_c = -expm1(c), improbable_r = -expm1(r);  // 1 - p, 1 - q
    const T odds = log_expm1(-r) - log_expm1(-c);
    const T denominator = improbable_c + exp(c - r) * improbable_r;
    const T d_rejected = scaled(improbable_c / denominator, T(1) / improbable_r);
    return {-chosen + beta * softplus(-odds), T(-1) - beta / denominator, beta * d_rejected};
  }
};

// --- a pair, from the arguments of a launcher ----------------------------------------------------

template <class T>
struct PairOutcome {
  T chosen, rejected;  // log-ratios
  T loss, d_chosen, d_rejected;
};

template <class T>
PFD_HD inline T value_or(const void* values, int64_t i, T otherwise) {
  return values == nullptr ? otherwise : static_cast<const T*>(values)[i];
}

// A response without tokens has an average of 0.
template <class T>
PFD_HD inline T length_or_one(const void* lengths, int64_t i) {
  const T length = value_or<T>(lengths, i, T(1));
  return length < T(1) ? T(1) : length;
}

template <class Loss, class T>
PFD_HD inline PairOutcome<T> evaluate_pair(const PairLossParams& p, int64_t i) {
  const T chosen =
      static_cast<const T*>(p.policy_chosen)[i] - value_or<T>(p.reference_chosen, i, 0);
  const T rejected =
      static_cast<const T*>(p.policy_rejected)[i] - value_or<T>(p.reference_rejected, i, 0);
  const T chosen_length = length_or_one<T>(p.chosen_lengths, i);
  const T rejected_length = length_or_one<T>(p.rejected_lengths, i);
  const T beta = T(p.params.beta);
  if constexpr (std::is_base_of<OfDifference, Loss>::value) {
    const auto scores = score_difference(chosen, rejected, chosen_length, rejected_length, p);
    const T margin = (T(p.margin) + value_or<T>(p.margins, i, 0)) / beta;
    const auto value = Loss::template eval<T>(scores.value - margin, p.params);
    return {chosen, rejected, value.loss, scaled(value.slope, scores.d_chosen),
            scaled(value.slope, scores.d_rejected)};
  } else {
    const T shift = value_or<T>(p.shift, 0, 0) / beta;
    const auto value = Loss::template eval<T>(chosen / chosen_length - shift,
                                              rejected / rejected_length - shift, p.params);
    return {chosen, rejected, value.loss, value.d_chosen / chosen_length,
            value.d_rejected / rejected_length};
  }
}

}  // namespace pyfast_dpo
