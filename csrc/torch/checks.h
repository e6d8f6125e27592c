// Checks of operators called directly; the public functions check first and raise ValueError or
// TypeError. Each names the operator, the argument, what was expected and what was given.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "common/dtype.h"

namespace pyfast_dpo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What Python's None is where a schema says Tensor.
inline bool is_given(const Tensor& tensor) { return tensor.defined(); }

inline std::string describe(const Tensor& tensor) {
  if (!is_given(tensor)) return "None";
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

inline DType float_dtype(const char* op, const char* name, const Tensor& tensor) {
  switch (is_given(tensor) ? tensor.scalar_type() : ScalarType::Bool) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " must be float64, float32, bfloat16 or float16, got ",
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
  bool good = is_given(tensor) && tensor.scalar_type() == dtype &&
              tensor.dim() == static_cast<int64_t>(shape.size()) &&
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

// What an operator writes must have elements apart from each other and from what it reads, or its
// result would depend on the order of its work.
inline void check_apart(const char* op, const char* name, const Tensor& out,
                        const std::vector<const Tensor*>& read) {
  std::vector<std::pair<int64_t, int64_t>> steps;  // stride and size of what has several elements
  for (int64_t i = 0; i < out.dim(); ++i) {
    if (out.size(i) == 0) return;
    if (out.size(i) > 1) steps.emplace_back(out.stride(i), out.size(i));
  }
  std::sort(steps.begin(), steps.end());
  int64_t span = 1;  // elements from the first to the last one
  bool apart = true;
  for (const auto& [stride, size] : steps) {
    apart = apart && stride >= span;
    span += stride * (size - 1);
  }
  STD_TORCH_CHECK(apart, op, ": elements of ", name, " must not share memory, got ", describe(out));
  const auto begin_of = [](const Tensor& t) {
    return reinterpret_cast<uintptr_t>(t.const_data_ptr());
  };
  const uintptr_t begin = begin_of(out);
  const uintptr_t end = begin + static_cast<uintptr_t>(span) * out.element_size();
  for (const Tensor* tensor : read) {
    int64_t reach = tensor->numel() == 0 ? 0 : 1;
    for (int64_t i = 0; reach > 0 && i < tensor->dim(); ++i)
      reach += tensor->stride(i) * (tensor->size(i) - 1);
    const uintptr_t first = begin_of(*tensor);
    const uintptr_t last = first + static_cast<uintptr_t>(reach) * tensor->element_size();
    STD_TORCH_CHECK(reach == 0 || last <= begin || end <= first, op, ": ", name,
                    " must not share memory with an argument that is read, got ", describe(out),
                    " and ", describe(*tensor));
  }
}

inline const void* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

}  // namespace pyfast_dpo
