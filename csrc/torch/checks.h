// Checks of operators called directly; the public functions check first and raise ValueError or
// TypeError. Each names the operator, the argument, what was expected and what was given.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "common/dtype.h"

namespace pyfast_dpo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string describe(const Tensor& tensor) {
  std::ostringstream out;
  out << "dtype " << torch::headeronly::toString(tensor.scalar_type()) << ", shape [";
  for (int64_t i = 0; i < tensor.dim(); ++i) out << (i ? ", " : "") << tensor.size(i);
  out << "], device " << (tensor.is_cuda() ? "cuda" : "cpu");
  return out.str();
}

inline std::vector<int64_t> shape_of(const Tensor& tensor) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < tensor.dim(); ++i) shape.push_back(tensor.size(i));
  return shape;
}

inline DType logits_dtype(const char* op, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": logits must be float64, float32, bfloat16 or float16, got ",
                      describe(tensor));
      return DType::kFloat32;
  }
}

inline ScalarType stat_scalar_type(DType dtype) {
  return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

// Dtype and shape, and that the device is that of `like`.
inline void check_shape(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                        const std::vector<int64_t>& shape, const Tensor& like) {
  bool good = tensor.scalar_type() == dtype && tensor.dim() == static_cast<int64_t>(shape.size()) &&
              tensor.is_cuda() == like.is_cuda() &&
              tensor.get_device_index() == like.get_device_index();
  for (size_t i = 0; good && i < shape.size(); ++i)
    good = tensor.size(static_cast<int64_t>(i)) == shape[i];
  if (!good) {
    std::ostringstream expected;
    expected << "dtype " << torch::headeronly::toString(dtype) << ", shape [";
    for (size_t i = 0; i < shape.size(); ++i) expected << (i ? ", " : "") << shape[i];
    expected << "], on the device of the first argument";
    STD_TORCH_CHECK(false, op, ": ", name, " must have ", expected.str(), ", got ",
                    describe(tensor));
  }
}

// The tensor, contiguous, after that check.
inline Tensor checked(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                      const std::vector<int64_t>& shape, const Tensor& like) {
  check_shape(op, name, tensor, dtype, shape, like);
  return torch::stable::contiguous(tensor);
}

inline std::optional<Tensor> checked(const char* op, const char* name,
                                     const std::optional<Tensor>& tensor, ScalarType dtype,
                                     const std::vector<int64_t>& shape, const Tensor& like) {
  if (!tensor.has_value()) return std::nullopt;
  return checked(op, name, *tensor, dtype, shape, like);
}

inline const void* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

}  // namespace pyfast_dpo
