#include "torch/cpu_driver.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cstring>
#include <limits>

#include "cpu/kernels.h"

namespace pyfast_dpo {
namespace {

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kSerialElements = 1 << 15;

// work(row) for every row. Rows are handed out one by one: ignored rows cost nothing, so equal
// shares of the rows would not be equal shares of the work. Who computes a row does not change its
// result.
template <class Work>
void for_each_row(int64_t count, int64_t vocab, const Work& work) {
  if (count * vocab <= kSerialElements) {
    for (int64_t row = 0; row < count; ++row) work(row);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t, int64_t) {
    for (int64_t row = next++; row < count; row = next++) work(row);
  });
}

template <class Stat>
void write_constants(const SeqLogpParams& p, int64_t row, double logp) {
  static_cast<Stat*>(p.token_logps)[row] = static_cast<Stat>(logp);
  static_cast<Stat*>(p.row_max)[row] = 0;
  static_cast<Stat*>(p.row_sum)[row] = 1;
}

template <class Stat>
void sum_sequences(const SeqLogpParams& p) {
  for (int64_t b = 0; b < p.rows.batch; ++b) {
    double sum = 0;
    int64_t scored = 0;
    for (int64_t row = b * p.rows.length; row < (b + 1) * p.rows.length; ++row) {
      if (target_of_row(p.rows, row) == kIgnoredRow) continue;
      sum += static_cast<const Stat*>(p.token_logps)[row];
      ++scored;
    }
    const double scale = !p.average ? 1.0 : scored == 0 ? 0.0 : 1.0 / static_cast<double>(scored);
    static_cast<Stat*>(p.sequence_logps)[b] =
        static_cast<Stat>(p.average && scored != 0 ? sum / static_cast<double>(scored) : sum);
    static_cast<Stat*>(p.sequence_scale)[b] = static_cast<Stat>(scale);
  }
}

template <class Stat>
double coefficient_of_row(const SeqLogpBackwardParams& p, int64_t row) {
  double coefficient = 0;
  if (p.grad_sequence != nullptr) {
    const int64_t b = row / p.rows.length;
    coefficient = static_cast<double>(static_cast<const Stat*>(p.grad_sequence)[b]) *
                  static_cast<const Stat*>(p.sequence_scale)[b];
  }
  if (p.grad_token != nullptr) coefficient += static_cast<const Stat*>(p.grad_token)[row];
  return coefficient;
}

// Gradient rows that need no logits: zeros for ignored rows, NaN for rows with an invalid label.
template <class T>
void fill_gradient_row(const SeqLogpBackwardParams& p, int64_t row, bool with_nan) {
  T* grad = static_cast<T*>(p.grad_logits) + (row / p.rows.length) * p.grad_batch_stride +
            (row % p.rows.length) * p.grad_row_stride;
  if (!with_nan) {
    std::memset(grad, 0, static_cast<size_t>(p.rows.vocab) * sizeof(T));
    return;
  }
  for (int64_t v = 0; v < p.rows.vocab; ++v) {
    grad[v] = narrow<T>(std::numeric_limits<double>::quiet_NaN());
  }
}

}  // namespace

const cpu::Kernels& cpu_kernels() {
  const cpu::Kernels* table = cpu::kernels();
  STD_TORCH_CHECK(table != nullptr,
                  "PYFAST_DPO_CPU_CAPABILITY must be generic, avx2, avx512, avx512_bf16 or amx and "
                  "available; this CPU "
                  "offers up to ",
                  cpu::best_capability());
  return *table;
}

void seq_logp_forward_cpu(const SeqLogpParams& params) {
  const cpu::ForwardRow forward = cpu_kernels().forward[static_cast<int>(params.dtype)];
  dispatch_dtype(params.dtype, [&](auto tag) {
    using Stat = typename StatOf<typename decltype(tag)::type>::type;
    for_each_row(params.rows.rows(), params.rows.vocab, [&](int64_t row) {
      const int64_t target = target_of_row(params.rows, row);
      if (target >= 0) {
        forward(params, row, target);
      } else {
        write_constants<Stat>(
            params, row, target == kIgnoredRow ? 0.0 : std::numeric_limits<double>::quiet_NaN());
      }
    });
    sum_sequences<Stat>(params);
  });
}

void seq_logp_backward_cpu(const SeqLogpBackwardParams& params) {
  const cpu::Kernels& table = cpu_kernels();
  const bool same = params.grad_dtype == params.dtype;
  const cpu::BackwardRow backward =
      (same ? table.backward : table.narrow_backward)[static_cast<int>(params.grad_dtype)];
  dispatch_dtype(params.grad_dtype, [&](auto tag) {
    using Out = typename decltype(tag)::type;
    for_each_row(params.rows.rows(), params.rows.vocab, [&](int64_t row) {
      const int64_t target = target_of_row(params.rows, row);
      if (target >= 0) {
        backward(params, row, target, coefficient_of_row<typename StatOf<Out>::type>(params, row));
      } else {
        fill_gradient_row<Out>(params, row, target == kInvalidLabel);
      }
    });
  });
}

void row_statistics_cpu(const RowStatisticsParams& params) {
  const cpu::StatisticsOfRow work = cpu_kernels().statistics[static_cast<int>(params.dtype)];
  for_each_row(params.rows, params.vocab, [&](int64_t row) { work(params, row); });
}

}  // namespace pyfast_dpo
