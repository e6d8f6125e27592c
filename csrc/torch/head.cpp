// The lm_head's three matrix products on the CPU, with float32 sums whatever the inputs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>

#include "cpu/kernels.h"
#include "torch/checks.h"
#include "torch/cpu_driver.h"

namespace pyfast_dpo {
namespace {

Tensor new_floats(const Tensor& like, int64_t count) {
  return torch::stable::new_empty(like, {count}, ScalarType::Float);
}

float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Runs task(index, workspace) for every index, each thread with `floats_each` floats of its own.
template <class Task>
void with_workspace(const Tensor& like, int64_t tasks, int64_t floats_each, const Task& task) {
  const int64_t threads = torch::stable::get_num_threads();
  const Tensor workspace = new_floats(like, threads * floats_each);
  std::atomic<int64_t> next_workspace{0}, next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    float* own = floats(workspace) + next_workspace++ * floats_each;
    for (int64_t i = next++; i < tasks; i = next++) task(i, own);
  });
}

struct Shapes {
  int64_t rows, hidden, vocab;
};

HeadParams head_params(const char* op, const Tensor& typed, const Tensor& weight, Shapes shapes) {
  HeadParams params{};
  params.dtype = logits_dtype(op, typed);
  STD_TORCH_CHECK(params.dtype != DType::kFloat64, op, ": float64 is not supported");
  params.rows = shapes.rows;
  params.hidden = shapes.hidden;
  params.vocab = shapes.vocab;
  params.weight = weight.const_data_ptr();
  return params;
}

void check_matrices(const char* op, const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2, op, ": arguments must be matrices, got ",
                  describe(a), " and ", describe(b));
}

// rows [R, H], weight [V, H] -> rows weight^T [R, V] float32
Tensor head_logits(const Tensor& rows_in, const Tensor& weight_in) {
  const char* op = "pyfast_dpo::head_logits";
  check_matrices(op, rows_in, weight_in);
  const Shapes shapes{rows_in.size(0), rows_in.size(1), weight_in.size(0)};
  const Tensor rows = torch::stable::contiguous(rows_in);
  const Tensor weight =
      checked(op, "weight", weight_in, rows.scalar_type(), {shapes.vocab, shapes.hidden}, rows);
  HeadParams params = head_params(op, rows, weight, shapes);
  const cpu::Gemm& gemm = cpu_kernels().gemm;
  const int type = static_cast<int>(params.dtype);
  const Tensor logits =
      torch::stable::new_empty(rows, {shapes.rows, shapes.vocab}, ScalarType::Float);
  const Tensor packed =
      new_floats(rows, divide_up(shapes.rows, gemm.rows) * shapes.hidden * gemm.left);
  gemm.pack_left[type](rows.const_data_ptr(), shapes.rows, shapes.hidden, floats(packed));
  params.packed_rows = floats(packed);
  params.logits = floats(logits);
  with_workspace(rows, divide_up(shapes.vocab, gemm.columns), shapes.hidden * gemm.columns,
                 [&](int64_t tile, float* own) { gemm.logits_tile[type](params, tile, own); });
  return logits;
}

// gradient [R, V] float32, weight [V, H] -> gradient weight [R, H] float32
Tensor head_grad_rows(const Tensor& gradient_in, const Tensor& weight_in) {
  const char* op = "pyfast_dpo::head_grad_rows";
  check_matrices(op, gradient_in, weight_in);
  const Shapes shapes{gradient_in.size(0), weight_in.size(1), weight_in.size(0)};
  const Tensor weight = torch::stable::contiguous(weight_in);
  const Tensor gradient =
      checked(op, "gradient", gradient_in, ScalarType::Float, {shapes.rows, shapes.vocab}, weight);
  HeadParams params = head_params(op, weight, weight, shapes);
  const cpu::Gemm& gemm = cpu_kernels().gemm;
  const int type = static_cast<int>(params.dtype);
  const Tensor result =
      torch::stable::new_empty(weight, {shapes.rows, shapes.hidden}, ScalarType::Float);
  params.logits = floats(gradient);
  params.grad_rows = floats(result);
  // A task reads the whole weight, so tasks are as large as the threads allow.
  const int64_t panels = divide_up(shapes.rows, gemm.rows);
  const int64_t each = divide_up(panels, torch::stable::get_num_threads()) * gemm.rows;
  with_workspace(weight, each == 0 ? 0 : divide_up(shapes.rows, each),
                 (each / gemm.rows * gemm.left + gemm.columns) * gemm.depth,
                 [&](int64_t task, float* own) {
                   const int64_t first = task * each;
                   const int64_t last = first + each < shapes.rows ? first + each : shapes.rows;
                   gemm.gradient_of_rows[type](params, first, last, own);
                 });
  return result;
}

// total [V, H] float32 += gradient^T rows, gradient [R, V] float32, rows [R, H]
void head_add_grad_weight_(const Tensor& total, const Tensor& gradient_in, const Tensor& rows_in) {
  const char* op = "pyfast_dpo::head_add_grad_weight_";
  check_matrices(op, gradient_in, rows_in);
  const Shapes shapes{rows_in.size(0), rows_in.size(1), gradient_in.size(1)};
  const Tensor rows = torch::stable::contiguous(rows_in);
  const Tensor gradient =
      checked(op, "gradient", gradient_in, ScalarType::Float, {shapes.rows, shapes.vocab}, rows);
  checked(op, "total", total, ScalarType::Float, {shapes.vocab, shapes.hidden}, rows);
  STD_TORCH_CHECK(total.is_contiguous(), op, ": total must be contiguous, got ", describe(total));
  HeadParams params = head_params(op, rows, rows, shapes);
  const cpu::Gemm& gemm = cpu_kernels().gemm;
  const int type = static_cast<int>(params.dtype);
  const Tensor packed =
      new_floats(rows, divide_up(shapes.hidden, gemm.columns) * gemm.columns * shapes.rows);
  gemm.pack_right[type](rows.const_data_ptr(), shapes.rows, shapes.hidden, floats(packed));
  params.packed_columns = floats(packed);
  params.logits = floats(gradient);
  params.grad_weight = floats(total);
  with_workspace(
      rows, divide_up(shapes.vocab, gemm.panels * gemm.rows), gemm.panels * gemm.left * shapes.rows,
      [&](int64_t block, float* own) { gemm.gradient_of_weight[type](params, block, own); });
}

}  // namespace
}  // namespace pyfast_dpo

STABLE_TORCH_LIBRARY_IMPL(pyfast_dpo, CPU, m) {
  m.impl("head_logits", TORCH_BOX(&pyfast_dpo::head_logits));
  m.impl("head_grad_rows", TORCH_BOX(&pyfast_dpo::head_grad_rows));
  m.impl("head_add_grad_weight_", TORCH_BOX(&pyfast_dpo::head_add_grad_weight_));
}
