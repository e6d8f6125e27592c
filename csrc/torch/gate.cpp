// The gate of a feed-forward layer on the CPU: checks, allocation, tasks.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "torch/checks.h"
#include "torch/cpu_driver.h"

namespace pyfast_dpo {
namespace {

constexpr int64_t kGrain = 1 << 14;  // elements that are worth a thread

// gate and what has its dtype and shape, all contiguous.
struct Gated {
  DType dtype;
  std::vector<int64_t> shape;
  Tensor gate, up;
  int64_t count;
};

Gated checked_gate(const char* op, const Tensor& gate, const Tensor& up) {
  const DType dtype = float_dtype(op, "gate", gate);
  STD_TORCH_CHECK(dtype != DType::kFloat64, op, ": gate must be float32, bfloat16 or float16, got ",
                  describe(gate));
  const std::vector<int64_t> shape = shape_of(gate);
  return {dtype, shape, torch::stable::contiguous(gate),
          checked(op, "up", up, gate.scalar_type(), shape, gate), gate.numel()};
}

Tensor silu_gate(const Tensor& gate, const Tensor& up) {
  const Gated in = checked_gate("pyfast_dpo::silu_gate", gate, up);
  const Tensor out = torch::stable::new_empty(in.gate, in.shape);
  GateParams p{};
  p.gate = in.gate.const_data_ptr();
  p.up = in.up.const_data_ptr();
  p.out = out.mutable_data_ptr();
  const auto work = cpu_kernels().gate.forward[static_cast<int>(in.dtype)];
  torch::stable::parallel_for(0, in.count, kGrain,
                              [&](int64_t first, int64_t last) { work(p, first, last); });
  return out;
}

std::tuple<Tensor, Tensor> silu_gate_backward(const Tensor& grad_output_in, const Tensor& gate,
                                              const Tensor& up) {
  const char* op = "pyfast_dpo::silu_gate_backward";
  const Gated in = checked_gate(op, gate, up);
  const Tensor grad_output =
      checked(op, "grad_output", grad_output_in, gate.scalar_type(), in.shape, gate);
  const Tensor grad_gate = torch::stable::new_empty(in.gate, in.shape);
  const Tensor grad_up = torch::stable::new_empty(in.gate, in.shape);
  GateParams p{};
  p.gate = in.gate.const_data_ptr();
  p.up = in.up.const_data_ptr();
  p.grad_output = grad_output.const_data_ptr();
  p.grad_gate = grad_gate.mutable_data_ptr();
  p.grad_up = grad_up.mutable_data_ptr();
  const auto work = cpu_kernels().gate.backward[static_cast<int>(in.dtype)];
  torch::stable::parallel_for(0, in.count, kGrain,
                              [&](int64_t first, int64_t last) { work(p, first, last); });
  return {grad_gate, grad_up};
}

}  // namespace
}  // namespace pyfast_dpo

STABLE_TORCH_LIBRARY_IMPL(pyfast_dpo, CPU, m) {
  m.impl("silu_gate", TORCH_BOX(&pyfast_dpo::silu_gate));
  m.impl("silu_gate_backward", TORCH_BOX(&pyfast_dpo::silu_gate_backward));
}
