// Losses of unpaired responses: of one log-ratio, its label and the KL estimate, a constant.
#pragma once

#include "common/macros.h"
#include "common/math.h"
#include "common/params.h"

namespace pyfast_dpo {

template <class T>
struct UnpairedValue {
  T loss, d_logratio;
};

// KTO (Ethayarajh et al. 2024, eq. 8, with lambda - v as the loss): desirable rows
// w_d (1 - sigmoid(beta (logratio - kl))), undesirable rows w_u (1 - sigmoid(beta (kl -
// logratio))). With kl = 0 it is APO-zero for unpaired responses.
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

// BCO (Jung et al. 2024): -w log sigmoid(+-(beta logratio - shift)), with kl = shift / beta.
struct Bco {
  static constexpr const char* name = "bco";
  template <class T>
  PFD_HD static UnpairedValue<T> eval(T logratio, bool is_desirable, T kl,
                                      const LossParams& params) {
    const T beta = T(params.beta);
    const T sign = is_desirable ? T(1) : T(-1);
    const T weight = T(is_desirable ? params.desirable_weight : params.undesirable_weight);
    const T h = sign * beta * (logratio - kl);
    return {weight * softplus(-h), -weight * sign * beta * sigmoid(-h)};
  }
};

}  // namespace pyfast_dpo
