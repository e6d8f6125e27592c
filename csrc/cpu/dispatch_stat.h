// The dtypes in which losses are computed.
#pragma once

#include "common/dtype.h"

namespace pyfast_dpo::cpu {

// Calls function(TypeTag<T>{}) with double for float64, else float.
template <class Function>
void dispatch_stat(DType dtype, Function&& function) {
  if (dtype == DType::kFloat64) {
    function(TypeTag<double>{});
  } else {
    function(TypeTag<float>{});
  }
}

}  // namespace pyfast_dpo::cpu
