// Checks that the operators of every loss table share.
#pragma once

#include <string>

#include "torch/checks.h"

namespace pyfast_dpo {

// float32 or float64, from the argument that gives the others their dtype and length.
inline DType stat_dtype(const char* op, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(
      is_given(tensor) && tensor.dim() == 1 &&
          (tensor.scalar_type() == ScalarType::Float || tensor.scalar_type() == ScalarType::Double),
      op, ": ", name, " must be float32 or float64 with one dimension, got ", describe(tensor));
  return tensor.scalar_type() == ScalarType::Double ? DType::kFloat64 : DType::kFloat32;
}

template <class List>
int loss_index(const char* op, const std::string& name) {
  const int index = List::index_of(name.c_str());
  if (index < 0) {
    std::string names;
    for (const char* known : List::kNames) names += std::string(names.empty() ? "" : ", ") + known;
    STD_TORCH_CHECK(false, op, ": loss must be one of ", names, ", got ", name);
  }
  return index;
}

}  // namespace pyfast_dpo
