// Normalization by the root mean square on the CPU: checks, allocation, tasks.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "torch/checks.h"
#include "torch/cpu_driver.h"
#include "torch/workspace.h"

namespace pyfast_dpo {
namespace {

// Rows of a task, whatever the number of threads: the weight's gradient is a sum of theirs, in
// order.
constexpr int64_t kRowsOfTask = 64;

// A contiguous input [..., width] and its weight [width].
struct Normed {
  std::vector<int64_t> shape;
  Tensor input, weight;
  int64_t rows, width;
};

Normed checked_norm(const char* op, const Tensor& input, const Tensor& weight) {
  const std::vector<int64_t> shape = is_given(input) ? shape_of(input) : std::vector<int64_t>{};
  STD_TORCH_CHECK(!shape.empty() && shape.back() > 0, op,
                  ": input must have a last dimension with elements, got ", describe(input));
  const int64_t width = shape.back();
  return {shape, checked(op, "input", input, ScalarType::Float, shape, input),
          checked(op, "weight", weight, ScalarType::Float, {width}, input), input.numel() / width,
          width};
}

NormParams params_of(const Normed& norm, const Tensor& inverse) {
  NormParams p{};
  p.width = norm.width;
  p.in = static_cast<const float*>(norm.input.const_data_ptr());
  p.weight = static_cast<const float*>(norm.weight.const_data_ptr());
  p.inverse = floats(inverse);
  return p;
}

// task(block, first row, last row) for every block of rows.
template <class Task>
void for_each_block(const Normed& norm, const Task& task) {
  with_workspace(norm.input, divide_up(norm.rows, kRowsOfTask), 0, [&](int64_t block, float*) {
    task(block, block * kRowsOfTask, std::min(norm.rows, (block + 1) * kRowsOfTask));
  });
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& input, const Tensor& weight, double epsilon) {
  const Normed norm = checked_norm("pyfast_dpo::rms_norm", input, weight);
  const Tensor output = torch::stable::new_empty(norm.input, norm.shape);
  const Tensor inverse = new_floats(norm.input, norm.rows);
  NormParams p = params_of(norm, inverse);
  p.epsilon = static_cast<float>(epsilon);
  p.out = floats(output);
  const auto forward = cpu_kernels().norm.forward;
  for_each_block(norm, [&](int64_t, int64_t first, int64_t last) { forward(p, first, last); });
  return {output, inverse};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_output_in, const Tensor& input,
                                             const Tensor& weight, const Tensor& inverse_in,
                                             bool of_weight) {
  const char* op = "pyfast_dpo::rms_norm_backward";
  const Normed norm = checked_norm(op, input, weight);
  const Tensor grad_output =
      checked(op, "grad_output", grad_output_in, ScalarType::Float, norm.shape, input);
  const Tensor inverse = checked(op, "inverse", inverse_in, ScalarType::Float, {norm.rows}, input);
  const Tensor grad_input = torch::stable::new_empty(norm.input, norm.shape);
  NormParams p = params_of(norm, inverse);
  p.grad_output = static_cast<const float*>(grad_output.const_data_ptr());
  p.grad_in = floats(grad_input);
  const int64_t blocks = of_weight ? divide_up(norm.rows, kRowsOfTask) : 0;
  Tensor sums = new_floats(norm.input, blocks * norm.width);
  torch::stable::zero_(sums);
  const auto backward = cpu_kernels().norm.backward;
  for_each_block(norm, [&](int64_t block, int64_t first, int64_t last) {
    backward(p, first, last, of_weight ? floats(sums) + block * norm.width : nullptr);
  });
  Tensor grad_weight = new_floats(norm.input, of_weight ? norm.width : 0);
  torch::stable::zero_(grad_weight);
  for (int64_t block = 0; block < blocks; ++block) {
    const float* part = floats(sums) + block * norm.width;
    for (int64_t i = 0; i < norm.width; ++i) floats(grad_weight)[i] += part[i];
  }
  return {grad_input, grad_weight};
}

}  // namespace
}  // namespace pyfast_dpo

STABLE_TORCH_LIBRARY_IMPL(pyfast_dpo, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&pyfast_dpo::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&pyfast_dpo::rms_norm_backward));
}
