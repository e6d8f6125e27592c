// Log-softmax + gather + masked sum over logits: checks, allocation, dispatch to cpu/ or cuda/.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "cpu/kernels.h"
#include "torch/checks.h"
#include "torch/cpu_driver.h"
#include "torch/cuda_stream.h"

namespace pyfast_dpo {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Kernels stride over batch and position; only a last dimension that is not contiguous is copied.
Tensor with_contiguous_rows(const Tensor& logits) {
  return logits.stride(2) == 1 || logits.size(2) <= 1 ? logits : torch::stable::contiguous(logits);
}

void check_logits(const char* op, const Tensor& logits) {
  STD_TORCH_CHECK(is_given(logits) && logits.dim() == 3 && logits.size(2) > 0, op,
                  ": logits must have shape [B, T, V] with V >= 1, got ", describe(logits));
}

RowLabels row_labels(const Tensor& logits, const Tensor& labels, int64_t ignore_index, bool shift) {
  return {static_cast<const int64_t*>(labels.const_data_ptr()),
          logits.size(0),
          logits.size(1),
          logits.size(2),
          ignore_index,
          shift};
}

void check_labels_in_range(const char* op, const RowLabels& rows) {
  const int64_t row = cpu::first_invalid_row(rows);
  if (row < 0) return;
  const int64_t position = row + (rows.shift ? 1 : 0);
  STD_TORCH_CHECK(false, op, ": labels must be in [0, ", rows.vocab, ") or ignore_index (",
                  rows.ignore_index, "), got ", rows.labels[position], " at [",
                  position / rows.length, ", ", position % rows.length, "]");
}

Outputs seq_logp(const Tensor& logits_in, const Tensor& labels_in, int64_t ignore_index, bool shift,
                 bool average, bool /*inplace_backward*/) {
  const char* op = "pyfast_dpo::seq_logp";
  check_logits(op, logits_in);
  const DType dtype = float_dtype(op, "logits", logits_in);
  const int64_t batch = logits_in.size(0), length = logits_in.size(1);
  const Tensor labels =
      checked(op, "labels", labels_in, ScalarType::Long, {batch, length}, logits_in);
  const Tensor logits = with_contiguous_rows(logits_in);

  const ScalarType stat = stat_scalar_type(dtype);
  const auto new_stat = [&](const std::vector<int64_t>& shape) {
    return torch::stable::new_empty(logits, shape, stat);
  };
  Outputs outputs{new_stat({batch}), new_stat({batch, length}), new_stat({batch, length}),
                  new_stat({batch, length}), new_stat({batch})};
  SeqLogpParams params{};
  params.logits = logits.const_data_ptr();
  params.batch_stride = logits.stride(0);
  params.row_stride = logits.stride(1);
  params.dtype = dtype;
  params.rows = row_labels(logits, labels, ignore_index, shift);
  params.average = average;
  params.sequence_logps = std::get<0>(outputs).mutable_data_ptr();
  params.token_logps = std::get<1>(outputs).mutable_data_ptr();
  params.row_max = std::get<2>(outputs).mutable_data_ptr();
  params.row_sum = std::get<3>(outputs).mutable_data_ptr();
  params.sequence_scale = std::get<4>(outputs).mutable_data_ptr();
  if (logits.is_cuda()) {
    const int64_t slices = cuda::seq_logp_slices(dtype, params.rows.vocab);
    Tensor workspace;  // torch's allocator: it outlives the launch in stream order
    if (slices > 1) {
      workspace = new_stat({slices - 1, 2, batch, length});
      params.slices = workspace.mutable_data_ptr();
    }
    launch_on_current_stream(op, logits,
                             [&](void* stream) { return cuda::seq_logp_forward(params, stream); });
  } else {
    check_labels_in_range(op, params.rows);
    seq_logp_forward_cpu(params);
  }
  return outputs;
}

// Fills grad (which may be logits itself) from what the forward pass left. `written`: what an
// argument is called that grad is.
void run_backward(const char* op, const std::optional<Tensor>& grad_sequence_in,
                  const std::optional<Tensor>& grad_token_in, const Tensor& logits,
                  const Tensor& labels_in, const Tensor& token_logps, const Tensor& row_max,
                  const Tensor& row_sum, const Tensor& sequence_scale, int64_t ignore_index,
                  bool shift, const Tensor& grad, const char* written = nullptr,
                  const std::optional<Tensor>& entropy_in = std::nullopt,
                  const std::optional<Tensor>& grad_entropy_in = std::nullopt) {
  const DType dtype = float_dtype(op, "logits", logits);
  const ScalarType stat = stat_scalar_type(dtype);
  const std::vector<int64_t> per_sequence{logits.size(0)}, per_row{logits.size(0), logits.size(1)};
  const Tensor labels = checked(op, "labels", labels_in, ScalarType::Long, per_row, logits);
  const Tensor logps = checked(op, "token_logps", token_logps, stat, per_row, logits);
  const Tensor maxima = checked(op, "row_max", row_max, stat, per_row, logits);
  const Tensor sums = checked(op, "row_sum", row_sum, stat, per_row, logits);
  const Tensor scale = checked(op, "sequence_scale", sequence_scale, stat, per_sequence, logits);
  const auto grad_sequence =
      checked(op, "grad_sequence", grad_sequence_in, stat, per_sequence, logits);
  const auto grad_token = checked(op, "grad_token", grad_token_in, stat, per_row, logits);
  const auto entropy = checked(op, "entropy", entropy_in, stat, per_row, logits);
  const auto grad_entropy = checked(op, "grad_entropy", grad_entropy_in, stat, per_row, logits);
  STD_TORCH_CHECK(entropy.has_value() == grad_entropy.has_value(), op,
                  ": entropy and grad_entropy go together, got one of them");
  if (written != nullptr) {
    std::vector<const Tensor*> read{&labels_in, &token_logps, &row_max, &row_sum, &sequence_scale};
    for (const auto* given : {&grad_sequence_in, &grad_token_in, &entropy_in, &grad_entropy_in})
      if (given->has_value()) read.push_back(&**given);
    const bool in_place = grad.const_data_ptr() == logits.const_data_ptr() &&
                          grad.scalar_type() == logits.scalar_type() &&
                          grad.stride(0) == logits.stride(0) && grad.stride(1) == logits.stride(1);
    if (!in_place) read.push_back(&logits);
    check_apart(op, written, grad, read);
  }

  SeqLogpBackwardParams params{};
  params.logits = logits.const_data_ptr();
  params.batch_stride = logits.stride(0);
  params.row_stride = logits.stride(1);
  params.dtype = dtype;
  params.rows = row_labels(logits, labels, ignore_index, shift);
  params.token_logps = logps.const_data_ptr();
  params.row_max = maxima.const_data_ptr();
  params.row_sum = sums.const_data_ptr();
  params.sequence_scale = scale.const_data_ptr();
  params.grad_sequence = data_or_null(grad_sequence);
  params.grad_token = data_or_null(grad_token);
  params.entropy = data_or_null(entropy);
  params.grad_entropy = data_or_null(grad_entropy);
  params.grad_logits = grad.mutable_data_ptr();
  params.grad_dtype = float_dtype(op, "out", grad);
  params.grad_batch_stride = grad.stride(0);
  params.grad_row_stride = grad.stride(1);
  if (logits.is_cuda()) {
    launch_on_current_stream(op, logits,
                             [&](void* stream) { return cuda::seq_logp_backward(params, stream); });
  } else {
    seq_logp_backward_cpu(params);
  }
}

void check_gradient_dtype(const char* op, const char* name, const Tensor& logits, ScalarType to) {
  const ScalarType from = logits.scalar_type();
  STD_TORCH_CHECK(
      to == from ||
          (from == ScalarType::Float && (to == ScalarType::BFloat16 || to == ScalarType::Half)),
      op, ": ", name,
      " must be of the dtype of logits or, for float32 logits, bfloat16 or float16, got ",
      torch::headeronly::toString(to), " for ", describe(logits));
}

Tensor seq_logp_backward(const std::optional<Tensor>& grad_sequence,
                         const std::optional<Tensor>& grad_token, const Tensor& logits_in,
                         const Tensor& labels, const Tensor& token_logps, const Tensor& row_max,
                         const Tensor& row_sum, const Tensor& sequence_scale, int64_t ignore_index,
                         bool shift, std::optional<ScalarType> out_dtype) {
  const char* op = "pyfast_dpo::seq_logp_backward";
  check_logits(op, logits_in);
  const ScalarType to = out_dtype.value_or(logits_in.scalar_type());
  check_gradient_dtype(op, "out_dtype", logits_in, to);
  const Tensor logits = with_contiguous_rows(logits_in);
  const Tensor grad =
      torch::stable::new_empty(logits, {logits.size(0), logits.size(1), logits.size(2)}, to);
  run_backward(op, grad_sequence, grad_token, logits, labels, token_logps, row_max, row_sum,
               sequence_scale, ignore_index, shift, grad);
  return grad;
}

void seq_logp_backward_out(const std::optional<Tensor>& grad_sequence,
                           const std::optional<Tensor>& grad_token, const Tensor& logits_in,
                           const Tensor& labels, const Tensor& token_logps, const Tensor& row_max,
                           const Tensor& row_sum, const Tensor& sequence_scale,
                           int64_t ignore_index, bool shift, const Tensor& out,
                           const std::optional<Tensor>& entropy,
                           const std::optional<Tensor>& grad_entropy) {
  const char* op = "pyfast_dpo::seq_logp_backward_out";
  check_logits(op, logits_in);
  STD_TORCH_CHECK(is_given(out), op, ": out must be a tensor, got None");
  check_gradient_dtype(op, "out", logits_in, out.scalar_type());
  const Tensor logits = with_contiguous_rows(logits_in);
  check_shape(op, "out", out, out.scalar_type(), {logits.size(0), logits.size(1), logits.size(2)},
              logits);
  STD_TORCH_CHECK(out.stride(2) == 1 || out.size(2) == 1, op,
                  ": the last dimension of out must be contiguous, got stride ", out.stride(2));
  run_backward(op, grad_sequence, grad_token, logits, labels, token_logps, row_max, row_sum,
               sequence_scale, ignore_index, shift, out, "out", entropy, grad_entropy);
}

void seq_logp_backward_(const std::optional<Tensor>& grad_sequence,
                        const std::optional<Tensor>& grad_token, const Tensor& logits,
                        const Tensor& labels, const Tensor& token_logps, const Tensor& row_max,
                        const Tensor& row_sum, const Tensor& sequence_scale, int64_t ignore_index,
                        bool shift) {
  const char* op = "pyfast_dpo::seq_logp_backward_";
  check_logits(op, logits);
  STD_TORCH_CHECK(logits.stride(2) == 1 || logits.size(2) == 1, op,
                  ": the last dimension of logits must be contiguous, got stride ",
                  logits.stride(2));
  run_backward(op, grad_sequence, grad_token, logits, labels, token_logps, row_max, row_sum,
               sequence_scale, ignore_index, shift, logits, "logits");
}

}  // namespace
}  // namespace pyfast_dpo

STABLE_TORCH_LIBRARY_IMPL(pyfast_dpo, CPU, m) {
  m.impl("seq_logp", TORCH_BOX(&pyfast_dpo::seq_logp));
  m.impl("seq_logp_backward", TORCH_BOX(&pyfast_dpo::seq_logp_backward));
  m.impl("seq_logp_backward_", TORCH_BOX(&pyfast_dpo::seq_logp_backward_));
  m.impl("seq_logp_backward_out", TORCH_BOX(&pyfast_dpo::seq_logp_backward_out));
}

STABLE_TORCH_LIBRARY_IMPL(pyfast_dpo, CUDA, m) {
  m.impl("seq_logp", TORCH_BOX(&pyfast_dpo::seq_logp));
  m.impl("seq_logp_backward", TORCH_BOX(&pyfast_dpo::seq_logp_backward));
  m.impl("seq_logp_backward_", TORCH_BOX(&pyfast_dpo::seq_logp_backward_));
  m.impl("seq_logp_backward_out", TORCH_BOX(&pyfast_dpo::seq_logp_backward_out));
}
