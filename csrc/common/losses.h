// THE loss table: the lists of losses that the CPU, CUDA, NumPy and the tests share.
//
// A loss is one struct with a name and `eval<T>`, its value and exact first derivatives:
//     losses_pair.h      of a pair's two log-ratios, or of their difference alone
//     losses_unpaired.h  of one log-ratio, its label and the KL estimate
//     losses_policy.h    of one token's log-prob, its log-ratio and its advantage
// Nothing here knows a vocabulary, a dtype of logits or a device. To add a loss: write its struct,
// add it to the list, add its formula to pyfast_dpo/losses/oracle.py and its row to
// pyfast_dpo/losses/table.py, which also says what the public names see (the reference or not, sums
// or averages) and which options go with them.
#pragma once

#include <cstring>

#include "common/losses_pair.h"
#include "common/losses_policy.h"
#include "common/losses_unpaired.h"

namespace pyfast_dpo {

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

using PairLosses = LossList<Sigmoid, Robust, Hinge, Ipo, ExoPair, DiscoPop, NcaPair, BcoPair,
                            SppoHard, ApoZero, ApoDown, Sft, Orpo>;
using UnpairedLosses = LossList<Kto, Bco>;
using PolicyLosses = LossList<Clip, ClipOfSum, Cispo, Sapo, Vespo, Reinforce>;

}  // namespace pyfast_dpo
