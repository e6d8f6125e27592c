// Rows in double, one element at a time: float64 logits, and the rare float rows out of the vector
// range.
#include <cmath>
#include <limits>

#include "common/math.h"
#include "cpu/kernels.h"
#include "cpu/row.h"

namespace pyfast_dpo::cpu {
namespace {

double read_stat(const void* values, DType dtype, int64_t i) {
  return dtype == DType::kFloat64 ? static_cast<const double*>(values)[i]
                                  : static_cast<const float*>(values)[i];
}

void write_stat(void* values, DType dtype, int64_t i, double value) {
  if (dtype == DType::kFloat64) {
    static_cast<double*>(values)[i] = value;
  } else {
    static_cast<float*>(values)[i] = static_cast<float>(value);
  }
}

}  // namespace

void write_row_stats(const SeqLogpParams& params, int64_t row, double others_max, double peak,
                     double total, double target_logit) {
  constexpr double kNothing = -std::numeric_limits<double>::infinity();
  const double gap = total == 0 ? kNothing : (peak - target_logit) + std::log(total);
  const double row_max = others_max > target_logit ? others_max : target_logit;
  const double others = total == 0 ? 0.0 : total * std::exp(peak - row_max);
  double logp = -softplus(gap);
  double row_sum = others + std::exp(target_logit - row_max);
  // Nothing in the row is possible, or its target is NaN or +inf: no distribution, as in torch.
  // (NaN or +inf elsewhere made the total NaN.)
  if ((total == 0 && target_logit == kNothing) || !(target_logit < -kNothing)) {
    logp = row_sum = std::numeric_limits<double>::quiet_NaN();
  }
  write_stat(params.token_logps, params.dtype, row, logp);
  write_stat(params.row_max, params.dtype, row, row_max);
  write_stat(params.row_sum, params.dtype, row, row_sum);
}

RowGradient read_row_gradient(const SeqLogpBackwardParams& params, int64_t row,
                              double coefficient) {
  const double row_sum = read_stat(params.row_sum, params.dtype, row);
  const double logp = read_stat(params.token_logps, params.dtype, row);
  RowGradient gradient{read_stat(params.row_max, params.dtype, row), -coefficient / row_sum, 0.0,
                       coefficient * -std::expm1(logp)};
  if (params.grad_entropy != nullptr) {
    const double entropy = read_stat(params.entropy, params.dtype, row);
    const double incoming = read_stat(params.grad_entropy, params.dtype, row);
    const double p = std::exp(logp);
    gradient.slope = -incoming / row_sum;
    gradient.scale += gradient.slope * (entropy - std::log(row_sum));
    if (p > 0) gradient.target_gradient -= incoming * p * (logp + entropy);
  }
  return gradient;
}

template <class T>
void scalar_forward_row(const SeqLogpParams& params, int64_t row, int64_t target) {
  const T* z =
      row_pointer<T>(params.logits, params.rows, params.batch_stride, params.row_stride, row);
  const int64_t vocab = params.rows.vocab;
  double peak = -std::numeric_limits<double>::infinity();
  for (int64_t v = 0; v < vocab; ++v) {
    const double value = widen(z[v]);
    if (v != target && !(value <= peak))
      peak = value;  // takes NaN, and keeps the last one or a larger value
  }
  double total = 0, lost = 0;  // compensated: a plain sum of V doubles loses up to V last places
  for (int64_t v = 0; v < vocab; ++v) {
    const double value = widen(z[v]);
    // With a peak of -inf every difference would be NaN; the sum of nothing is 0.
    if (v != target && value != -std::numeric_limits<double>::infinity()) {
      const double term = std::exp(value - peak) - lost;
      const double sum = total + term;
      lost = (sum - total) - term;
      total = sum;
    }
  }
  write_row_stats(params, row, peak, peak, total, widen(z[target]));
}

template void scalar_forward_row<double>(const SeqLogpParams&, int64_t, int64_t);
template void scalar_forward_row<float>(const SeqLogpParams&, int64_t, int64_t);
template void scalar_forward_row<BFloat16>(const SeqLogpParams&, int64_t, int64_t);
template void scalar_forward_row<Float16>(const SeqLogpParams&, int64_t, int64_t);

template <class T, class Out>
static void backward_row(const SeqLogpBackwardParams& params, int64_t row, int64_t target,
                         double coefficient) {
  const T* z =
      row_pointer<T>(params.logits, params.rows, params.batch_stride, params.row_stride, row);
  Out* grad = const_cast<Out*>(row_pointer<Out>(
      params.grad_logits, params.rows, params.grad_batch_stride, params.grad_row_stride, row));
  const RowGradient gradient = read_row_gradient(params, row, coefficient);
  for (int64_t v = 0; v < params.rows.vocab; ++v) {
    const double distance = widen(z[v]) - gradient.row_max, e = std::exp(distance);
    const double shift = gradient.slope == 0 || e == 0 ? 0.0 : gradient.slope * distance;
    grad[v] = narrow<Out>((gradient.scale + shift) * e);  // 0 * -inf is 0 here
  }
  grad[target] = narrow<Out>(gradient.target_gradient);
}

void scalar_backward_row(const SeqLogpBackwardParams& params, int64_t row, int64_t target,
                         double coefficient) {
  if (params.grad_dtype != params.dtype) {
    if (params.grad_dtype == DType::kBFloat16) {
      backward_row<float, BFloat16>(params, row, target, coefficient);
    } else {
      backward_row<float, Float16>(params, row, target, coefficient);
    }
    return;
  }
  dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    backward_row<T, T>(params, row, target, coefficient);
  });
}

void write_row_statistics(const RowStatisticsParams& params, int64_t row, double peak, double total,
                          double moment, double squares, double logits) {
  const double log_total = std::log(total), entropy = log_total - moment / total;
  const int64_t target = params.targets[row];
  const bool valid = target >= 0 && target < params.vocab && entropy == entropy;
  write_stat(params.entropy, params.dtype, row, entropy);
  write_stat(params.mean_logits, params.dtype, row, logits / static_cast<double>(params.vocab));
  write_stat(params.log_sum_sq_probs, params.dtype, row, std::log(squares) - 2 * log_total);
  params.is_top1[row] =
      valid && read_stat(params.logits, params.dtype, row * params.row_stride + target) >= peak;
}

void scalar_statistics_of_row(const RowStatisticsParams& params, int64_t row) {
  const double* z = static_cast<const double*>(params.logits) + row * params.row_stride;
  double peak = z[0], total = 0, moment = 0, squares = 0, logits = 0;
  for (int64_t v = 1; v < params.vocab; ++v) peak = z[v] > peak ? z[v] : peak;
  for (int64_t v = 0; v < params.vocab; ++v) {
    const double distance = z[v] - peak, e = std::exp(distance);
    total += e;
    moment += e == 0 ? 0.0 : e * distance;  // 0 * -inf is 0 here
    squares += e * e;
    logits += z[v];
  }
  write_row_statistics(params, row, peak, total, moment, squares, logits);
}

int64_t first_invalid_row(const RowLabels& rows) {
  for (int64_t row = 0; row < rows.rows(); ++row) {
    if (target_of_row(rows, row) == kInvalidLabel) return row;
  }
  return -1;
}

}  // namespace pyfast_dpo::cpu
