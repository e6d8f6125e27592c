// Statistics of the rows of logits: checks, allocation, dispatch to cpu/ or cuda/.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "torch/checks.h"
#include "torch/cpu_driver.h"
#include "torch/cuda_stream.h"

namespace pyfast_dpo {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> row_statistics(const Tensor& logits_in,
                                                          const Tensor& targets_in,
                                                          const std::optional<Tensor>& row_max_in) {
  const char* op = "pyfast_dpo::row_statistics";
  const DType dtype = float_dtype(op, "logits", logits_in);
  STD_TORCH_CHECK(logits_in.dim() == 2 && logits_in.size(1) > 0 &&
                      (dtype == DType::kFloat64 || dtype == DType::kFloat32),
                  op, ": logits must be float32 or float64 [R, V] with V >= 1, got ",
                  describe(logits_in));
  const int64_t rows = logits_in.size(0);
  const Tensor targets = checked(op, "targets", targets_in, ScalarType::Long, {rows}, logits_in);
  const auto row_max =
      checked(op, "row_max", row_max_in, logits_in.scalar_type(), {rows}, logits_in);
  const bool rows_are_contiguous = logits_in.stride(1) == 1 || logits_in.size(1) == 1;
  const Tensor logits = rows_are_contiguous ? logits_in : torch::stable::contiguous(logits_in);
  const auto new_values = [&](ScalarType type) {
    return torch::stable::new_empty(logits, {rows}, type);
  };
  const Tensor entropy = new_values(logits.scalar_type()), mean = new_values(logits.scalar_type());
  const Tensor top1 = new_values(ScalarType::Bool), squares = new_values(logits.scalar_type());
  const RowStatisticsParams params{logits.const_data_ptr(),
                                   logits.stride(0),
                                   dtype,
                                   rows,
                                   logits.size(1),
                                   static_cast<const int64_t*>(targets.const_data_ptr()),
                                   data_or_null(row_max),
                                   entropy.mutable_data_ptr(),
                                   mean.mutable_data_ptr(),
                                   static_cast<bool*>(top1.mutable_data_ptr()),
                                   squares.mutable_data_ptr()};
  if (logits.is_cuda()) {
    launch_on_current_stream(op, logits,
                             [&](void* stream) { return cuda::row_statistics(params, stream); });
  } else {
    row_statistics_cpu(params);
  }
  return {entropy, mean, top1, squares};
}

}  // namespace
}  // namespace pyfast_dpo

STABLE_TORCH_LIBRARY_IMPL(pyfast_dpo, CPU, m) {
  m.impl("row_statistics", TORCH_BOX(&pyfast_dpo::row_statistics));
}

STABLE_TORCH_LIBRARY_IMPL(pyfast_dpo, CUDA, m) {
  m.impl("row_statistics", TORCH_BOX(&pyfast_dpo::row_statistics));
}
