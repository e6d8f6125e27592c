// Every operator on one screen. Fake and autograd registrations are in pyfast_dpo/ops/operators.py.
//
// Shapes: B sequences, T positions, V vocabulary, P pairs, N unpaired sequences. "stat" is float32,
// or float64 for float64 inputs. The numbers a row that the forward pass hands to the backward pass
// are described in csrc/common/params.h.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(pyfast_dpo, m) {
  // logits [B, T, V], labels [B, T] int64 -> sequence_logps [B], token_logps [B, T], row_max [B,
  // T], row_sum [B, T], sequence_scale [B], all stat. inplace_backward is for autograd: its
  // backward pass then calls seq_logp_backward_.
  m.def(
      "seq_logp(Tensor logits, Tensor labels, int ignore_index, bool shift, bool average, "
      "bool inplace_backward) -> (Tensor sequence_logps, Tensor token_logps, Tensor row_max, "
      "Tensor row_sum, Tensor sequence_scale)");
  // grad_sequence [B], grad_token [B, T] -> gradient [B, T, V] in the dtype of logits. float32
  // logits may have it in a half type: what the products of a half lm_head take next.
  m.def(
      "seq_logp_backward(Tensor? grad_sequence, Tensor? grad_token, Tensor logits, Tensor labels, "
      "Tensor token_logps, Tensor row_max, Tensor row_sum, Tensor sequence_scale, int "
      "ignore_index, bool shift, ScalarType? out_dtype=None) -> Tensor");
  // The same, written over logits.
  m.def(
      "seq_logp_backward_(Tensor? grad_sequence, Tensor? grad_token, Tensor(a!) logits, Tensor "
      "labels, "
      "Tensor token_logps, Tensor row_max, Tensor row_sum, Tensor sequence_scale, int "
      "ignore_index, "
      "bool shift) -> ()");
  // The same, written to out [B, T, V], in the dtype of logits or, of float32 ones, a half type.
  // With grad_entropy [B, T], that of the rows' entropies (as row_statistics gives them), its
  // gradient is added.
  m.def(
      "seq_logp_backward_out(Tensor? grad_sequence, Tensor? grad_token, Tensor logits, Tensor "
      "labels, Tensor token_logps, Tensor row_max, Tensor row_sum, Tensor sequence_scale, int "
      "ignore_index, bool shift, Tensor(a!) out, Tensor? entropy=None, Tensor? grad_entropy=None) "
      "-> ()");

  // logits [R, V] float32 or float64, targets [R] int64 -> entropy [R], mean of the logits [R],
  // is_top1 [R] bool, log of the sum of squared probabilities [R]; without gradient. row_max [R]:
  // the largest logits, where they are known
  m.def(
      "row_statistics(Tensor logits, Tensor targets, Tensor? row_max=None) -> (Tensor entropy, "
      "Tensor mean_logits, Tensor is_top1, Tensor log_sum_sq_probs)");

  // values *= factor [], float32 (float64 for float64 values), on CUDA: read there, and where it is
  // 1 the values are left alone
  m.def("scale_(Tensor(a!) values, Tensor factor) -> ()");

  // The lm_head on the CPU, float32 sums whatever the inputs. R rows, H hidden.
  // out [R, V] float32 = rows [R, H] weight [V, H]^T
  m.def("head_logits_(Tensor(a!) out, Tensor rows, Tensor weight) -> ()");
  // gradient [R, V] float32, or bfloat16 with a bfloat16 weight, weight [V, H] -> [R, H] float32
  m.def("head_grad_rows(Tensor gradient, Tensor weight) -> Tensor");
  // out [V, H] = gradient^T rows (gradient as above), float32 or in the dtype of rows; accumulate:
  // added to a float32 out; total [V, H] float32: added to what another out receives
  m.def(
      "head_grad_weight_(Tensor(a!) out, Tensor gradient, Tensor rows, bool accumulate, "
      "Tensor? total) -> ()");

  // Linear layers on the CPU, all float32: out [R, N] = rows [R, K] weight [N, K]^T + low_rows [R,
  // r] low_weight [N, r]^T
  m.def(
      "linear_(Tensor(a!) out, Tensor rows, Tensor weight, Tensor? low_rows=None, Tensor? "
      "low_weight=None) -> ()");
  // gradient [R, N] weight [N, K] + low_gradient [R, r] low_weight [r, K] -> [R, K]
  m.def(
      "linear_grad_rows(Tensor gradient, Tensor weight, Tensor? low_gradient=None, Tensor? "
      "low_weight=None) -> Tensor");
  // gradient [R, N]^T rows [R, K] -> [N, K]
  m.def("linear_grad_weight(Tensor gradient, Tensor rows) -> Tensor");

  // silu(gate) * up on the CPU, any shape -> the same shape
  m.def("silu_gate(Tensor gate, Tensor up) -> Tensor");
  m.def(
      "silu_gate_backward(Tensor grad_output, Tensor gate, Tensor up) -> (Tensor grad_gate, Tensor "
      "grad_up)");

  // input [..., H] / sqrt(mean of squares + epsilon) * weight [H], float32 on the CPU -> the same
  // shape, and the factors of rows [R]
  m.def("rms_norm(Tensor input, Tensor weight, float epsilon) -> (Tensor output, Tensor inverse)");
  // the gradient of the weight has no elements unless it is wanted
  m.def(
      "rms_norm_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor inverse, bool "
      "of_weight) -> (Tensor grad_input, Tensor grad_weight)");

  // Attention over a row of shared prompts, on the CPU: query [T, heads, D], key and value [T, key
  // heads, D] -> output [T, heads, D], log_sums [heads, T] float32. blocks [B, 4] int64 on the CPU:
  // first query, queries, first and number of the prompt's keys before theirs.
  m.def(
      "shared_prompt_attention(Tensor query, Tensor key, Tensor value, Tensor blocks, float scale, "
      "int window) -> (Tensor output, Tensor log_sums)");
  m.def(
      "shared_prompt_attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor "
      "value, "
      "Tensor output, Tensor log_sums, Tensor blocks, float scale, int window) -> (Tensor "
      "grad_query, Tensor grad_key, Tensor grad_value)");

  // log-probs, lengths, margins [P] and shift [1], stat -> losses, chosen_rewards,
  // rejected_rewards [P]
  m.def(
      "pair_loss(Tensor policy_chosen, Tensor policy_rejected, Tensor? reference_chosen, "
      "Tensor? reference_rejected, Tensor? chosen_lengths, Tensor? rejected_lengths, "
      "Tensor? margins, Tensor? shift, str loss, float beta, float label_smoothing, "
      "float discopop_tau, float margin, str divergence, float divergence_alpha, "
      "bool average_first) -> (Tensor losses, Tensor chosen_rewards, Tensor rejected_rewards)");
  // -> gradients of the policy's log-probs [P]
  m.def(
      "pair_loss_backward(Tensor grad_losses, Tensor policy_chosen, Tensor policy_rejected, "
      "Tensor? reference_chosen, "
      "Tensor? reference_rejected, Tensor? chosen_lengths, Tensor? rejected_lengths, "
      "Tensor? margins, Tensor? shift, str loss, float beta, float label_smoothing, "
      "float discopop_tau, float margin, str divergence, float divergence_alpha, "
      "bool average_first) -> (Tensor grad_chosen, Tensor grad_rejected)");

  // log-probs [N] stat, is_desirable [N] bool, kl [1] stat -> losses, rewards [N]
  m.def(
      "unpaired_loss(Tensor policy, Tensor? reference, Tensor is_desirable, Tensor kl, str loss, "
      "float beta, float desirable_weight, float undesirable_weight) -> (Tensor losses, Tensor "
      "rewards)");
  m.def(
      "unpaired_loss_backward(Tensor grad_losses, Tensor policy, Tensor? reference, "
      "Tensor is_desirable, Tensor kl, str loss, float beta, float desirable_weight, "
      "float undesirable_weight) -> Tensor");

  // Policy losses: log-probs, advantages ([N] or [S]), correction [N] stat, mask [N] bool, offsets
  // [S + 1] int64 on the device of the others -> sums over the scored tokens of each sequence [S];
  // per token [N]: losses, d sum / d log-prob, KL estimates, ratios, clipped int8
  m.def(
      "policy_loss(Tensor logps, Tensor? old, Tensor? reference, Tensor advantages, Tensor? "
      "correction, Tensor? mask, Tensor offsets, str loss, bool sequence_level, bool "
      "sequence_means, float epsilon, float epsilon_high, float delta, float sapo_temperature_pos, "
      "float sapo_temperature_neg, float vespo_k_pos, float vespo_lambda_pos, float vespo_k_neg, "
      "float vespo_lambda_neg, float beta, str kl_estimator, bool kl_with_ratio) -> (Tensor "
      "sequence_losses, Tensor token_losses, Tensor coefficients, Tensor kl, Tensor ratios, Tensor "
      "clipped)");
  // rewards, values [B, T], last_values [B] stat, dones, mask [B, T] bool -> advantages [B, T]
  m.def(
      "gae(Tensor rewards, Tensor values, Tensor? last_values, Tensor? dones, Tensor? mask, float "
      "gamma, float lam) -> Tensor");
}
