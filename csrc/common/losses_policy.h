// Losses of a policy, of one number a token: on-policy training (PPO, GRPO and kin).
//
//     eval(logp, log_ratio, advantage) -> {loss, d_logp, d_log_ratio, clipped}
//
// logp is the log-prob of the token now. log_ratio is what a trainer bounds: logp less the log-prob
// at sampling, of the token, or its mean over the sequence, or (kOfSum) its sum over the sequence.
// It is an argument of its own, so that one struct serves every level. The ratio is e^log_ratio
// with log_ratio held within +-20 (constant, without a slope, beyond), so that nothing overflows.
#pragma once

#include "common/macros.h"
#include "common/math.h"
#include "common/params.h"

namespace pyfast_dpo {

template <class T>
struct PolicyValue {
  T loss, d_logp, d_log_ratio;
  int clipped = 0;  // -1 below the range, 1 above it: where the bound took the gradient away
};

template <class T>
struct Ratio {
  T value, slope;
};

constexpr double kMostLogRatio = 20;
constexpr double kLeastLogWeight = -18.420680743952367;  // log 1e-8, of VESPO's weights

template <class T>
PFD_HD inline Ratio<T> ratio_of(T log_ratio) {
  const T most = T(kMostLogRatio);
  if (log_ratio > most) return {exp(most), T(0)};
  if (log_ratio < -most) return {exp(-most), T(0)};
  const T value = exp(log_ratio);
  return {value, value};
}

// What a loss says of its log-ratio, unless it says otherwise.
struct OfToken {
  static constexpr bool kOfSum = false;          // the sequence's is the sum, not the mean
  static constexpr bool kCorrectsRatio = false;  // a foreign sampler's weight is part of it
};

// PPO's clipped objective (Schulman et al. 2017, eq. 7) with bounds of their own below and above
// (DAPO, Yu et al. 2025, eq. 10): -min(r A, clip(r) A). delta bounds r itself where A < 0 (dual
// clip, Ye et al. 2020, eq. 5).
struct Clip : OfToken {
  static constexpr const char* name = "clip";
  template <class T>
  PFD_HD static PolicyValue<T> eval(T, T log_ratio, T advantage, const PolicyOptions& options) {
    const Ratio<T> ratio = ratio_of(log_ratio);
    const T low = T(1) - T(options.epsilon), high = T(1) + T(options.epsilon_high);
    const T delta = T(options.delta);
    const T bounded = ratio.value < low ? low : ratio.value > high ? high : ratio.value;
    const T freely = ratio.value > delta ? delta : ratio.value;
    const int clipped = ratio.value < low && advantage < T(0)    ? -1
                        : ratio.value > high && advantage > T(0) ? 1
                                                                 : 0;
    const T objective = freely * advantage, other = bounded * advantage;
    if (objective <= other) {
      return {-objective, T(0), ratio.value > delta ? T(0) : -advantage * ratio.slope, clipped};
    }
    return {-other, T(0), T(0) * other, clipped};  // NaN stays NaN
  }
};

// The same of the ratio of a whole sequence, e^(sum of its log-ratios) (RLOO, Ahmadian et al. 2024,
// with the clip of its implementations).
struct ClipOfSum : Clip {
  static constexpr const char* name = "clip_of_sum";
  static constexpr bool kOfSum = true;
};

// CISPO (MiniMax-M1, Chen et al. 2025, eq. 4): -sg(min(r, bound)) A logp.
struct Cispo : OfToken {
  static constexpr const char* name = "cispo";
  template <class T>
  PFD_HD static PolicyValue<T> eval(T logp, T log_ratio, T advantage,
                                    const PolicyOptions& options) {
    const T ratio = ratio_of(log_ratio).value, bound = T(options.epsilon_high);
    const T weight = (ratio > bound ? bound : ratio) * advantage;
    return {-scaled(weight, logp), -weight, T(0), ratio > bound && advantage > T(0) ? 1 : 0};
  }
};

// SAPO (Gao et al. 2025): -A (4 / t) sigmoid(t (r - 1)), a temperature t for each sign of A.
struct Sapo : OfToken {
  static constexpr const char* name = "sapo";
  template <class T>
  PFD_HD static PolicyValue<T> eval(T, T log_ratio, T advantage, const PolicyOptions& options) {
    const Ratio<T> ratio = ratio_of(log_ratio);
    const T temperature =
        T(advantage > T(0) ? options.sapo_temperature_pos : options.sapo_temperature_neg);
    const T gate = sigmoid(temperature * (ratio.value - T(1)));
    const T slope = T(4) * gate * (T(1) - gate) * ratio.slope;
    return {-advantage * T(4) / temperature * gate, T(0), -advantage * slope};
  }
};

// VESPO: -sg(phi(W)) A logp, phi(W) = e^l W^k e^(-l W) with phi(1) = 1, W the sequence's ratio, (k,
// l) by the sign of A. log W is held within (log 1e-8, 20).
struct Vespo : OfToken {
  static constexpr const char* name = "vespo";
  static constexpr bool kOfSum = true;
  static constexpr bool kCorrectsRatio = true;
  template <class T>
  PFD_HD static PolicyValue<T> eval(T logp, T log_ratio, T advantage,
                                    const PolicyOptions& options) {
    const bool positive = advantage >= T(0);
    const T k = T(positive ? options.vespo_k_pos : options.vespo_k_neg);
    const T lambda = T(positive ? options.vespo_lambda_pos : options.vespo_lambda_neg);
    const T least = T(kLeastLogWeight), most = T(kMostLogRatio);
    const T x = log_ratio < least ? least : log_ratio > most ? most : log_ratio;
    const T weight = exp(lambda + k * x - lambda * exp(x)) * advantage;
    return {-scaled(weight, logp), -weight, T(0)};
  }
};

// REINFORCE (Williams 1992): -A logp.
struct Reinforce : OfToken {
  static constexpr const char* name = "reinforce";
  template <class T>
  PFD_HD static PolicyValue<T> eval(T logp, T, T advantage, const PolicyOptions&) {
    return {-scaled(advantage, logp), -advantage, T(0)};
  }
};

// An estimate of KL(policy || reference) from one token (Schulman 2020), and its slope in logp. u =
// reference - logp: k1 = -u, k2 = u^2 / 2, k3 = e^u - u - 1 with u held below 20.
template <class T>
struct KlValue {
  T kl, slope;
};

template <class T>
PFD_HD inline KlValue<T> kl_of(T logp, T reference, KlEstimator estimator) {
  const T u = reference - logp;
  if (estimator == KlEstimator::kK1) return {-u, T(1)};
  if (estimator == KlEstimator::kK2) return {T(0.5) * u * u, -u};
  const T most = T(kMostLogRatio);
  if (u > most) return {exp(most) - most - T(1), T(0)};
  // e^u - 1 - u without cancellation for small u
  const T minus_one = expm1(u);
  const T kl = u > T(-1e-2) && u < T(1e-2)
                   ? u * u * (T(0.5) + u * (T(1) / T(6) + u * (T(1) / T(24) + u / T(120))))
                   : minus_one - u;
  return {kl, -minus_one};
}

// --- one token, for the loops of the CPU and of CUDA
// ----------------------------------------------

struct Range {
  int64_t first, last;
};

// The tokens of a sequence; offsets of a caller's never lead outside the arrays.
PFD_HD inline Range tokens_of(const PolicyLossParams& p, int64_t sequence) {
  const auto inside = [&](int64_t i) { return i < 0 ? int64_t{0} : i > p.tokens ? p.tokens : i; };
  const int64_t first = inside(p.offsets[sequence]), last = inside(p.offsets[sequence + 1]);
  return {first, last < first ? first : last};
}

PFD_HD inline bool is_scored(const PolicyLossParams& p, int64_t t) {
  return p.mask == nullptr || p.mask[t];
}

// logp - old; where nothing is older, the token is as it was sampled.
template <class T>
PFD_HD inline T log_ratio_at(const PolicyLossParams& p, int64_t t) {
  if (p.old == nullptr) return T(0);
  return static_cast<const T*>(p.logps)[t] - static_cast<const T*>(p.old)[t];
}

// log W of VESPO: the token's share, with what corrects a foreign sampler.
template <class T>
PFD_HD inline T bounded_log_ratio_at(const PolicyLossParams& p, int64_t t) {
  const T most = T(kMostLogRatio), x = log_ratio_at<T>(p, t);
  T share = x < -most ? -most : x > most ? most : x;
  if (p.correction != nullptr) {
    const T least = T(kLeastLogWeight);
    const T other = log(static_cast<const T*>(p.correction)[t]);
    share += other < least ? least : other > most ? most : other;
  }
  return share;
}

// Writes what is reported of a token and returns its loss and derivatives, the penalty included.
// `sequence_log_ratio` is used by the level of a sequence and by losses of a sum.
template <class Loss, class T>
PFD_HD inline PolicyValue<T> evaluate_policy_token(const PolicyLossParams& p, int64_t t,
                                                   int64_t sequence, T sequence_log_ratio) {
  const T logp = static_cast<const T*>(p.logps)[t];
  const T advantage = static_cast<const T*>(p.advantages)[p.advantage_per_token ? t : sequence];
  const T own = p.sequence_level ? sequence_log_ratio : log_ratio_at<T>(p, t);
  PolicyValue<T> value =
      Loss::template eval<T>(logp, Loss::kOfSum ? sequence_log_ratio : own, advantage, p.options);
  if (p.correction != nullptr && !Loss::kCorrectsRatio) {
    const T weight = static_cast<const T*>(p.correction)[t];
    value.loss = scaled(weight, value.loss);
    value.d_logp *= weight;
    value.d_log_ratio *= weight;
  }
  const Ratio<T> ratio = ratio_of(own);
  T kl = T(0);
  if (p.reference != nullptr) {
    const KlValue<T> estimate = kl_of(logp, static_cast<const T*>(p.reference)[t], p.kl_estimator);
    const T beta = T(p.beta);
    kl = estimate.kl;
    if (p.kl_with_ratio) {
      value.loss += beta * scaled(ratio.value, kl);
      value.d_logp += beta * ratio.value * estimate.slope;
      value.d_log_ratio += beta * scaled(ratio.slope, kl);
    } else {
      value.loss += beta * kl;
      value.d_logp += beta * estimate.slope;
    }
  }
  static_cast<T*>(p.token_losses)[t] = value.loss;
  static_cast<T*>(p.kl)[t] = kl;
  static_cast<T*>(p.ratios)[t] = ratio.value;
  p.clipped[t] = static_cast<int8_t>(value.clipped);
  return value;
}

template <class T>
PFD_HD inline void write_unscored_token(const PolicyLossParams& p, int64_t t) {
  static_cast<T*>(p.token_losses)[t] = T(0);
  static_cast<T*>(p.coefficients)[t] = T(0);
  static_cast<T*>(p.kl)[t] = T(0);
  static_cast<T*>(p.ratios)[t] = T(1);
  p.clipped[t] = 0;
}

}  // namespace pyfast_dpo
