// Losses on one number a sequence: checks, allocation, dispatch to cpu/ or cuda/.
#include "common/losses.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "torch/checks.h"
#include "torch/cuda_stream.h"
#include "torch/loss_checks.h"

namespace pyfast_dpo {
namespace {

Divergence divergence_of(const char* op, const std::string& name) {
  if (name == "reverse_kl") return Divergence::kReverseKl;
  if (name == "js_divergence") return Divergence::kJensenShannon;
  STD_TORCH_CHECK(name == "alpha_divergence", op,
                  ": divergence must be reverse_kl, js_divergence or alpha_divergence, got ", name);
  return Divergence::kAlpha;
}

// The arguments of a pair loss, checked; contiguous copies in `held` keep the memory of `params`
// alive.
struct PairInputs {
  std::vector<Tensor> held;
  PairLossParams params{};

  PairInputs(const char* op, const Tensor& policy_chosen, const Tensor& policy_rejected,
             const std::optional<Tensor>& reference_chosen,
             const std::optional<Tensor>& reference_rejected,
             const std::optional<Tensor>& chosen_lengths,
             const std::optional<Tensor>& rejected_lengths, const std::optional<Tensor>& margins,
             const std::optional<Tensor>& shift, const std::string& loss, double beta,
             double label_smoothing, double discopop_tau, double margin,
             const std::string& divergence, double divergence_alpha, bool average_first) {
    params.dtype = stat_dtype(op, "policy_chosen", policy_chosen);
    params.loss = loss_index<PairLosses>(op, loss);
    params.pairs = policy_chosen.size(0);
    params.params.beta = beta;
    params.params.label_smoothing = label_smoothing;
    params.params.discopop_tau = discopop_tau;
    params.margin = margin;
    params.divergence = divergence_of(op, divergence);
    params.divergence_alpha = divergence_alpha;
    params.average_first = average_first;
    const auto data = [&](const char* name, const std::optional<Tensor>& tensor,
                          int64_t size) -> const void* {
      if (!tensor.has_value()) return nullptr;
      held.push_back(
          checked(op, name, *tensor, policy_chosen.scalar_type(), {size}, policy_chosen));
      return held.back().const_data_ptr();
    };
    params.policy_chosen = data("policy_chosen", policy_chosen, params.pairs);
    params.policy_rejected = data("policy_rejected", policy_rejected, params.pairs);
    params.reference_chosen = data("reference_chosen", reference_chosen, params.pairs);
    params.reference_rejected = data("reference_rejected", reference_rejected, params.pairs);
    params.chosen_lengths = data("chosen_lengths", chosen_lengths, params.pairs);
    params.rejected_lengths = data("rejected_lengths", rejected_lengths, params.pairs);
    params.margins = data("margins", margins, params.pairs);
    params.shift = data("shift", shift, 1);
  }

  Tensor new_output() const { return torch::stable::empty_like(held.front()); }
};

std::tuple<Tensor, Tensor, Tensor> pair_loss(
    const Tensor& policy_chosen, const Tensor& policy_rejected,
    const std::optional<Tensor>& reference_chosen, const std::optional<Tensor>& reference_rejected,
    const std::optional<Tensor>& chosen_lengths, const std::optional<Tensor>& rejected_lengths,
    const std::optional<Tensor>& margins, const std::optional<Tensor>& shift,
    const std::string& loss, double beta, double label_smoothing, double discopop_tau,
    double margin, const std::string& divergence, double divergence_alpha, bool average_first) {
  const char* op = "pyfast_dpo::pair_loss";
  PairInputs in(op, policy_chosen, policy_rejected, reference_chosen, reference_rejected,
                chosen_lengths, rejected_lengths, margins, shift, loss, beta, label_smoothing,
                discopop_tau, margin, divergence, divergence_alpha, average_first);
  Tensor losses = in.new_output(), chosen_rewards = in.new_output(),
         rejected_rewards = in.new_output();
  in.params.losses = losses.mutable_data_ptr();
  in.params.chosen_rewards = chosen_rewards.mutable_data_ptr();
  in.params.rejected_rewards = rejected_rewards.mutable_data_ptr();
  if (policy_chosen.is_cuda()) {
    launch_on_current_stream(op, policy_chosen, [&](void* stream) {
      return cuda::pair_loss_forward(in.params, stream);
    });
  } else {
    cpu::pair_loss_forward(in.params);
  }
  return {losses, chosen_rewards, rejected_rewards};
}

std::tuple<Tensor, Tensor> pair_loss_backward(
    const Tensor& grad_losses_in, const Tensor& policy_chosen, const Tensor& policy_rejected,
    const std::optional<Tensor>& reference_chosen, const std::optional<Tensor>& reference_rejected,
    const std::optional<Tensor>& chosen_lengths, const std::optional<Tensor>& rejected_lengths,
    const std::optional<Tensor>& margins, const std::optional<Tensor>& shift,
    const std::string& loss, double beta, double label_smoothing, double discopop_tau,
    double margin, const std::string& divergence, double divergence_alpha, bool average_first) {
  const char* op = "pyfast_dpo::pair_loss_backward";
  PairInputs in(op, policy_chosen, policy_rejected, reference_chosen, reference_rejected,
                chosen_lengths, rejected_lengths, margins, shift, loss, beta, label_smoothing,
                discopop_tau, margin, divergence, divergence_alpha, average_first);
  const Tensor grad_losses = checked(op, "grad_losses", grad_losses_in, policy_chosen.scalar_type(),
                                     {in.params.pairs}, policy_chosen);
  Tensor grad_chosen = in.new_output(), grad_rejected = in.new_output();
  in.params.grad_losses = grad_losses.const_data_ptr();
  in.params.grad_chosen = grad_chosen.mutable_data_ptr();
  in.params.grad_rejected = grad_rejected.mutable_data_ptr();
  if (policy_chosen.is_cuda()) {
    launch_on_current_stream(op, policy_chosen, [&](void* stream) {
      return cuda::pair_loss_backward(in.params, stream);
    });
  } else {
    cpu::pair_loss_backward(in.params);
  }
  return {grad_chosen, grad_rejected};
}

// The arguments of an unpaired loss, likewise.
struct UnpairedInputs {
  Tensor policy, is_desirable, kl;
  std::optional<Tensor> reference;
  UnpairedLossParams params{};

  UnpairedInputs(const char* op, const Tensor& policy_in, const std::optional<Tensor>& reference_in,
                 const Tensor& is_desirable_in, const Tensor& kl_in, const std::string& loss,
                 double beta, double desirable_weight, double undesirable_weight) {
    params.dtype = stat_dtype(op, "policy", policy_in);
    params.loss = loss_index<UnpairedLosses>(op, loss);
    params.count = policy_in.size(0);
    params.params.beta = beta;
    params.params.desirable_weight = desirable_weight;
    params.params.undesirable_weight = undesirable_weight;
    const ScalarType stat = policy_in.scalar_type();
    policy = checked(op, "policy", policy_in, stat, {params.count}, policy_in);
    reference = checked(op, "reference", reference_in, stat, {params.count}, policy_in);
    is_desirable =
        checked(op, "is_desirable", is_desirable_in, ScalarType::Bool, {params.count}, policy_in);
    kl = checked(op, "kl", kl_in, stat, {1}, policy_in);
    params.policy = policy.const_data_ptr();
    params.reference = data_or_null(reference);
    params.is_desirable = static_cast<const bool*>(is_desirable.const_data_ptr());
    params.kl = kl.const_data_ptr();
  }
};

std::tuple<Tensor, Tensor> unpaired_loss(const Tensor& policy,
                                         const std::optional<Tensor>& reference,
                                         const Tensor& is_desirable, const Tensor& kl,
                                         const std::string& loss, double beta,
                                         double desirable_weight, double undesirable_weight) {
  const char* op = "pyfast_dpo::unpaired_loss";
  UnpairedInputs in(op, policy, reference, is_desirable, kl, loss, beta, desirable_weight,
                    undesirable_weight);
  Tensor losses = torch::stable::empty_like(in.policy);
  Tensor rewards = torch::stable::empty_like(in.policy);
  in.params.losses = losses.mutable_data_ptr();
  in.params.rewards = rewards.mutable_data_ptr();
  if (policy.is_cuda()) {
    launch_on_current_stream(
        op, policy, [&](void* stream) { return cuda::unpaired_loss_forward(in.params, stream); });
  } else {
    cpu::unpaired_loss_forward(in.params);
  }
  return {losses, rewards};
}

Tensor unpaired_loss_backward(const Tensor& grad_losses_in, const Tensor& policy,
                              const std::optional<Tensor>& reference, const Tensor& is_desirable,
                              const Tensor& kl, const std::string& loss, double beta,
                              double desirable_weight, double undesirable_weight) {
  const char* op = "pyfast_dpo::unpaired_loss_backward";
  UnpairedInputs in(op, policy, reference, is_desirable, kl, loss, beta, desirable_weight,
                    undesirable_weight);
  const Tensor grad_losses =
      checked(op, "grad_losses", grad_losses_in, policy.scalar_type(), {in.params.count}, policy);
  Tensor grad_policy = torch::stable::empty_like(in.policy);
  in.params.grad_losses = grad_losses.const_data_ptr();
  in.params.grad_policy = grad_policy.mutable_data_ptr();
  if (policy.is_cuda()) {
    launch_on_current_stream(
        op, policy, [&](void* stream) { return cuda::unpaired_loss_backward(in.params, stream); });
  } else {
    cpu::unpaired_loss_backward(in.params);
  }
  return grad_policy;
}

}  // namespace
}  // namespace pyfast_dpo

STABLE_TORCH_LIBRARY_IMPL(pyfast_dpo, CPU, m) {
  m.impl("pair_loss", TORCH_BOX(&pyfast_dpo::pair_loss));
  m.impl("pair_loss_backward", TORCH_BOX(&pyfast_dpo::pair_loss_backward));
  m.impl("unpaired_loss", TORCH_BOX(&pyfast_dpo::unpaired_loss));
  m.impl("unpaired_loss_backward", TORCH_BOX(&pyfast_dpo::unpaired_loss_backward));
}

STABLE_TORCH_LIBRARY_IMPL(pyfast_dpo, CUDA, m) {
  m.impl("pair_loss", TORCH_BOX(&pyfast_dpo::pair_loss));
  m.impl("pair_loss_backward", TORCH_BOX(&pyfast_dpo::pair_loss_backward));
  m.impl("unpaired_loss", TORCH_BOX(&pyfast_dpo::unpaired_loss));
  m.impl("unpaired_loss_backward", TORCH_BOX(&pyfast_dpo::unpaired_loss_backward));
}
