// Policy losses and advantages: checks, allocation, dispatch to cpu/ or cuda/.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/losses.h"
#include "cpu/kernels.h"
#include "torch/checks.h"
#include "torch/cuda_stream.h"
#include "torch/loss_checks.h"

namespace pyfast_dpo {
namespace {

KlEstimator estimator_of(const char* op, const std::string& name) {
  if (name == "k1") return KlEstimator::kK1;
  if (name == "k2") return KlEstimator::kK2;
  STD_TORCH_CHECK(name == "k3", op, ": kl_estimator must be k1, k2 or k3, got ", name);
  return KlEstimator::kK3;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> policy_loss(
    const Tensor& logps_in, const std::optional<Tensor>& old_in,
    const std::optional<Tensor>& reference_in, const Tensor& advantages_in,
    const std::optional<Tensor>& correction_in, const std::optional<Tensor>& mask_in,
    const Tensor& offsets_in, const std::string& loss, bool sequence_level, bool sequence_means,
    double epsilon, double epsilon_high, double delta, double sapo_temperature_pos,
    double sapo_temperature_neg, double vespo_k_pos, double vespo_lambda_pos, double vespo_k_neg,
    double vespo_lambda_neg, double beta, const std::string& kl_estimator, bool kl_with_ratio) {
  const char* op = "pyfast_dpo::policy_loss";
  PolicyLossParams p{};
  p.dtype = stat_dtype(op, "logps", logps_in);
  p.loss = loss_index<PolicyLosses>(op, loss);
  p.tokens = logps_in.size(0);
  STD_TORCH_CHECK(is_given(offsets_in) && offsets_in.dim() == 1 && offsets_in.size(0) >= 1, op,
                  ": offsets must be int64 [S + 1], got ", describe(offsets_in));
  p.sequences = offsets_in.size(0) - 1;
  p.options = {
      epsilon,     epsilon_high,     delta,       sapo_temperature_pos, sapo_temperature_neg,
      vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg};
  p.sequence_level = sequence_level;
  p.sequence_means = sequence_means;
  p.beta = beta;
  p.kl_estimator = estimator_of(op, kl_estimator);
  p.kl_with_ratio = kl_with_ratio;
  const ScalarType stat = logps_in.scalar_type();
  const auto per_token = [&](const char* name, const std::optional<Tensor>& tensor) {
    return checked(op, name, tensor, stat, {p.tokens}, logps_in);
  };
  const Tensor logps = checked(op, "logps", logps_in, stat, {p.tokens}, logps_in);
  const auto old = per_token("old", old_in), reference = per_token("reference", reference_in);
  const auto correction = per_token("correction", correction_in);
  p.advantage_per_token =
      is_given(advantages_in) && advantages_in.dim() == 1 && advantages_in.size(0) != p.sequences;
  const Tensor advantages = checked(op, "advantages", advantages_in, stat,
                                    {p.advantage_per_token ? p.tokens : p.sequences}, logps_in);
  const auto mask = checked(op, "mask", mask_in, ScalarType::Bool, {p.tokens}, logps_in);
  const Tensor offsets =
      checked(op, "offsets", offsets_in, ScalarType::Long, {p.sequences + 1}, logps_in);
  p.offsets = static_cast<const int64_t*>(offsets.const_data_ptr());
  if (!logps.is_cuda()) {  // on CUDA this would wait for the device; the kernel stays inside
    bool good = p.offsets[0] == 0 && p.offsets[p.sequences] == p.tokens;
    for (int64_t s = 0; s < p.sequences; ++s) good = good && p.offsets[s] <= p.offsets[s + 1];
    STD_TORCH_CHECK(good, op, ": offsets must rise from 0 to the number of tokens, ", p.tokens);
  }
  p.logps = logps.const_data_ptr();
  p.old = data_or_null(old);
  p.reference = data_or_null(reference);
  p.advantages = advantages.const_data_ptr();
  p.correction = data_or_null(correction);
  p.mask = static_cast<const bool*>(data_or_null(mask));
  Tensor sequence_losses = torch::stable::new_empty(logps, {p.sequences});
  Tensor token_losses = torch::stable::empty_like(logps);
  Tensor coefficients = torch::stable::empty_like(logps), kl = torch::stable::empty_like(logps);
  Tensor ratios = torch::stable::empty_like(logps);
  Tensor clipped = torch::stable::new_empty(logps, {p.tokens}, ScalarType::Char);
  p.sequence_losses = sequence_losses.mutable_data_ptr();
  p.token_losses = token_losses.mutable_data_ptr();
  p.coefficients = coefficients.mutable_data_ptr();
  p.kl = kl.mutable_data_ptr();
  p.ratios = ratios.mutable_data_ptr();
  p.clipped = static_cast<int8_t*>(clipped.mutable_data_ptr());
  if (logps.is_cuda()) {
    launch_on_current_stream(op, logps, [&](void* stream) { return cuda::policy_loss(p, stream); });
  } else {
    cpu::policy_loss(p);
  }
  return {sequence_losses, token_losses, coefficients, kl, ratios, clipped};
}

Tensor gae(const Tensor& rewards_in, const Tensor& values_in,
           const std::optional<Tensor>& last_values_in, const std::optional<Tensor>& dones_in,
           const std::optional<Tensor>& mask_in, double gamma, double lam) {
  const char* op = "pyfast_dpo::gae";
  GaeParams p{};
  STD_TORCH_CHECK(is_given(rewards_in) && rewards_in.dim() == 2 &&
                      (rewards_in.scalar_type() == ScalarType::Float ||
                       rewards_in.scalar_type() == ScalarType::Double),
                  op, ": rewards must be float32 or float64 [B, T], got ", describe(rewards_in));
  const ScalarType stat = rewards_in.scalar_type();
  p.dtype = stat == ScalarType::Double ? DType::kFloat64 : DType::kFloat32;
  p.batch = rewards_in.size(0);
  p.length = rewards_in.size(1);
  p.gamma = gamma;
  p.lam = lam;
  const std::vector<int64_t> shape{p.batch, p.length};
  const Tensor rewards = checked(op, "rewards", rewards_in, stat, shape, rewards_in);
  const Tensor values = checked(op, "values", values_in, stat, shape, rewards_in);
  const auto last_values = checked(op, "last_values", last_values_in, stat, {p.batch}, rewards_in);
  const auto dones = checked(op, "dones", dones_in, ScalarType::Bool, shape, rewards_in);
  const auto mask = checked(op, "mask", mask_in, ScalarType::Bool, shape, rewards_in);
  Tensor advantages = torch::stable::empty_like(rewards);
  p.rewards = rewards.const_data_ptr();
  p.values = values.const_data_ptr();
  p.last_values = data_or_null(last_values);
  p.dones = static_cast<const bool*>(data_or_null(dones));
  p.mask = static_cast<const bool*>(data_or_null(mask));
  p.advantages = advantages.mutable_data_ptr();
  if (rewards.is_cuda()) {
    launch_on_current_stream(op, rewards, [&](void* stream) { return cuda::gae(p, stream); });
  } else {
    cpu::gae(p);
  }
  return advantages;
}

}  // namespace
}  // namespace pyfast_dpo

STABLE_TORCH_LIBRARY_IMPL(pyfast_dpo, CPU, m) {
  m.impl("policy_loss", TORCH_BOX(&pyfast_dpo::policy_loss));
  m.impl("gae", TORCH_BOX(&pyfast_dpo::gae));
}

STABLE_TORCH_LIBRARY_IMPL(pyfast_dpo, CUDA, m) {
  m.impl("policy_loss", TORCH_BOX(&pyfast_dpo::policy_loss));
  m.impl("gae", TORCH_BOX(&pyfast_dpo::gae));
}
