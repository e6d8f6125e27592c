// THE loss table: one struct a loss, used by the CPU, by CUDA and by the tests.
//
// A pair loss sees the two log-ratios
//     chosen = log pi(y_w|x) - log ref(y_w|x),   rejected = log pi(y_l|x) - log ref(y_l|x)
// and returns its value and its exact derivatives with respect to both; an unpaired loss sees one
// log-ratio, the label and the KL estimate. Nothing here knows a vocabulary, a dtype of logits or a
// device. To add a loss: write its struct, add it to the list, add its formula to
// pyfast_dpo/reference.py.
#pragma once

#include <cstring>

#include "common/macros.h"
#include "common/math.h"
#include "common/params.h"

namespace pyfast_dpo {

template <class T>
struct PairValue {
  T loss, d_chosen, d_rejected;
};

template <class T>
struct UnpairedValue {
  T loss, d_logratio;
};

// DPO (Rafailov et al. 2023, eq. 7); label_smoothing e gives conservative DPO (Mitchell 2023):
//   -(1 - e) log sigmoid(h) - e log sigmoid(-h) = log(1 + e^-|h|) + (e if h > 0 else 1 - e) |h|,
//   h = beta (chosen - rejected).
// The right-hand form is exactly ln 2 at h = 0 for every e. An impossible response makes h
// infinite; e = 0 then leaves a loss of 0 or inf, not 0 * inf.
struct Sigmoid {
  static constexpr const char* name = "sigmoid";
  template <class T>
  PFD_HD static PairValue<T> eval(T chosen, T rejected, const LossParams& params) {
    const T beta = T(params.beta), smoothing = T(params.label_smoothing);
    const T h = beta * (chosen - rejected);
    const T slope = beta * (smoothing - sigmoid(-h));
    const T distance = h > T(0) ? h : -h;
    const T share = h > T(0) ? smoothing : T(1) - smoothing;
    const T linear = share > T(0) ? share * distance : T(0);
    return {log1p(exp(-distance)) + linear, slope, -slope};
  }
};

// IPO (Azar et al. 2023, eq. 17): (chosen - rejected - 1 / (2 beta))^2.
struct Ipo {
  static constexpr const char* name = "ipo";
  template <class T>
  PFD_HD static PairValue<T> eval(T chosen, T rejected, const LossParams& params) {
    const T distance = chosen - rejected - T(0.5 / params.beta);
    return {distance * distance, T(2) * distance, T(-2) * distance};
  }
};

// KTO (Ethayarajh et al. 2024, eq. 8, with lambda - v as the loss): desirable rows
// w_d (1 - sigmoid(beta (logratio - kl))), undesirable rows w_u (1 - sigmoid(beta (kl -
// logratio))). kl is a constant.
struct Kto {
  static constexpr const char* name = "kto";
  template <class T>
  PFD_HD static UnpairedValue<T> eval(T logratio, bool is_desirable, T kl,
                                      const LossParams& params) {
    const T beta = T(params.beta);
    const T sign = is_desirable ? T(1) : T(-1);
    const T weight = T(is_desirable ? params.desirable_weight : params.undesirable_weight);
    const T h = sign * beta * (logratio - kl);
    return {weight * sigmoid(-h), -weight * sign * beta * sigmoid(h) * sigmoid(-h)};
  }
};

template <class... Losses>
struct LossList {
  static constexpr int kCount = sizeof...(Losses);
  static constexpr const char* kNames[] = {Losses::name...};

  // Position of a name in the list, -1 when it is not there.
  static int index_of(const char* name) {
    for (int i = 0; i < kCount; ++i) {
      if (std::strcmp(kNames[i], name) == 0) return i;
    }
    return -1;
  }

  // Calls function(Loss{}) for the index-th loss; false when there is none.
  template <class Function>
  static bool dispatch(int index, Function&& function) {
    int i = 0;
    return ((i++ == index ? (function(Losses{}), true) : false) || ...);
  }
};

using PairLosses = LossList<Sigmoid, Ipo>;
using UnpairedLosses = LossList<Kto>;

}  // namespace pyfast_dpo
