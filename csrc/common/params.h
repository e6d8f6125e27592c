// Arguments of every kernel launcher: raw pointers, sizes and strides, shapes in the comments.
// B sequences, T positions, V vocabulary. Strides count elements. All offsets are int64.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/macros.h"

namespace pyfast_dpo {

// Which rows of logits are scored, and against which label.
struct RowLabels {
  const int64_t* labels;  // [B, T], contiguous
  int64_t batch;          // B
  int64_t length;         // T
  int64_t vocab;          // V
  int64_t ignore_index;
  bool shift;  // position t scores labels[b, t + 1]; the last position of a sequence is not scored

  int64_t rows() const { return batch * length; }
};

// Result of looking a row's label up: a token of [0, V), or one of the two below.
constexpr int64_t kIgnoredRow = -1;
constexpr int64_t kInvalidLabel = -2;

PFD_HD inline int64_t target_of_row(const RowLabels& rows, int64_t row) {
  const int64_t t = row % rows.length;
  if (rows.shift && t + 1 == rows.length) return kIgnoredRow;
  const int64_t label = rows.labels[rows.shift ? row + 1 : row];
  if (label == rows.ignore_index) return kIgnoredRow;
  return label >= 0 && label < rows.vocab ? label : kInvalidLabel;
}

// Three numbers a row come out of the forward pass (float, or double for float64 logits) and are
// all that the backward pass needs beside the logits:
//   logp     log softmax(z)[target], computed as -softplus(lse_of_the_others - z_target), so that
//   it
//            neither rounds to 0 nor exceeds 0 when the model is certain; 0 for ignored rows, NaN
//            for rows with an invalid label
//   row_max  max_v z_v
//   row_sum  sum_v exp(z_v - row_max)
struct SeqLogpParams {
  const void* logits;  // [B, T, V], last dimension contiguous
  int64_t batch_stride;
  int64_t row_stride;
  DType dtype;
  RowLabels rows;
  void* token_logps;  // [B, T]
  void* row_max;      // [B, T]
  void* row_sum;      // [B, T]
  void* slices;       // CUDA only: workspace [seq_logp_slices - 1, 2, B T] of the statistics' dtype
  void* sequence_logps;  // [B]   sum (or average) of token_logps over the scored positions
  void* sequence_scale;  // [B]   1, or with average 1 / number of scored positions (0 when there is
                         // none)
  bool average;
};

// d logits[b, t, v] = coefficient(b, t) * ((v == target) - p_v) - grad_entropy(b, t) * p_v *
// (log p_v + entropy(b, t)), where p_v = exp(z_v - row_max) / row_sum and coefficient(b, t) =
// grad_sequence[b] * sequence_scale[b] + grad_token[b, t]. Ignored rows become 0, rows with an
// invalid label NaN. `grad_logits` may be `logits` (same dtype and strides): each element is read
// before it is written. kFloat32 logits may have a gradient in a half type.
struct SeqLogpBackwardParams {
  const void* logits;  // [B, T, V], last dimension contiguous
  int64_t batch_stride;
  int64_t row_stride;
  DType dtype;
  RowLabels rows;
  const void* token_logps;     // [B, T]
  const void* row_max;         // [B, T]
  const void* row_sum;         // [B, T]
  const void* sequence_scale;  // [B]
  const void* grad_sequence;   // [B] or null
  const void* grad_token;      // [B, T] contiguous, or null
  const void* entropy;         // [B, T] of p, or null
  const void* grad_entropy;    // [B, T] beside entropy, or null
  void* grad_logits;           // [B, T, V], last dimension contiguous
  DType grad_dtype;
  int64_t grad_batch_stride;
  int64_t grad_row_stride;
};

// What a trainer reports of a row's distribution p = softmax(z). A row with NaN or +inf, or with
// nothing but -inf, has none: NaN, and no hit.
struct RowStatisticsParams {
  const void* logits;      // [R, V]
  int64_t row_stride;      // elements between rows
  DType dtype;             // kFloat32 or kFloat64
  int64_t rows;            // R
  int64_t vocab;           // V
  const int64_t* targets;  // [R]; outside [0, V): no hit
  const void* row_max;     // [R] in the dtype of the logits, or null; on CUDA it spares a pass
  // [R] each, in the dtype of the logits
  void* entropy;           // log sum exp z - sum p z
  void* mean_logits;       // sum z / V
  bool* is_top1;           // no logit is larger than the target's; a tie is a hit
  void* log_sum_sq_probs;  // log sum p^2
};

// values *= *factor, on CUDA.
struct ScaleParams {
  DType dtype;
  int64_t count;
  void* values;        // contiguous
  const void* factor;  // one, float32 (float64 for float64 values), on the device
};

// The lm_head on the CPU: R rows of hidden states, all matrices contiguous, float32 sums.
struct HeadParams {
  DType dtype;  // of rows and weight: kFloat32, kBFloat16 or kFloat16
  int64_t rows;
  int64_t hidden;
  int64_t vocab;
  const void* weight;           // [V, H]
  const float* packed_rows;     // the rows in left panels, for the logits
  const float* packed_columns;  // the rows in right panels, for the gradient of the weight
  float* logits;                // [R, V]
  const void* gradient;         // [R, V], of the logits: float32, or bfloat16 like the weight
  int64_t gradient_stride;      // between its rows
  float* grad_rows;             // [R, H]
  void* grad_weight;            // [V, H] = total + gradient; float32 or of the weight's dtype
  const float* total;           // [V, H] or null: 0; grad_weight itself if that is float32
};

// A linear layer's product on the CPU, float32: out [R, N] = left [R, K], or the transpose of one
// [K, R], and low_left [R, r], side by side, times K + r rows of N in right panels.
struct LinearParams {
  int64_t rows;
  int64_t depth;    // K
  int64_t low;      // the rank r of an adapter, or 0
  int64_t columns;  // N
  const float* left;
  bool left_transposed;
  const float* low_left;
  const float* packed_columns;
  float* out;
};

// out = silu(gate) * up, or the gradients of gate and up, elementwise on the CPU.
struct GateParams {
  const void* gate;
  const void* up;
  void* out;
  const void* grad_output;
  void* grad_gate;
  void* grad_up;
};

// Rows of a width over their root mean square, times a weight [width], float32 on the CPU: out = in
// * inverse * weight with inverse = 1 / sqrt(mean(in^2) + epsilon); or the gradient of in.
struct NormParams {
  int64_t width;
  const float* in;
  const float* weight;
  float epsilon;
  float* inverse;  // of every row
  float* out;
  const float* grad_output;
  float* grad_in;
};

// Attention over one row of shared prompts, on the CPU. T tokens, D width of a head.

// Queries that lie together in the row. Their keys are a prompt before them, all of it, and then
// their own, causally. Blocks without a prompt begin a group; the others' prompt is the beginning
// of the group's first block.
struct AttentionBlock {
  int64_t first, count;                // the queries
  int64_t prompt_first, prompt_count;  // keys before their own
};

// Elements of a head are contiguous; strides between tokens and between heads.
struct HeadsView {
  const void* data;  // [T, heads, D]
  int64_t token_stride;
  int64_t head_stride;
};

struct AttentionParams {
  DType dtype;  // of everything but log_sums: kFloat32, kBFloat16 or kFloat16
  int64_t tokens;
  int64_t heads;
  int64_t key_heads;  // divides heads
  int64_t width;
  const AttentionBlock* blocks;
  float scale;     // > 0
  int64_t window;  // positions that a query sees, itself included
  HeadsView query, key, value;
  void* output;     // [T, heads, D]
  float* log_sums;  // [heads, T] log2 of the sum of exp(scale * score)
  // backward
  HeadsView grad_output;
  void* grad_query;  // [T, heads, D]
  void* grad_key;    // [T, key heads, D]
  void* grad_value;  // [T, key heads, D]
};

// Losses on one number a sequence. P pairs; N unpaired sequences. float or double throughout.

// What a pair loss sees of a log-ratio x: phi(x) of divergence.h. The default is x itself.
enum class Divergence : int { kReverseKl = 0, kJensenShannon = 1, kAlpha = 2 };

struct LossParams {
  double beta = 0.1;
  double label_smoothing = 0.0;
  double discopop_tau = 0.05;
  double desirable_weight = 1.0;
  double undesirable_weight = 1.0;
};

struct PairLossParams {
  DType dtype;  // kFloat32 or kFloat64
  int loss;     // index into PairLosses (losses.h)
  int64_t pairs;
  LossParams params;
  double margin;  // every pair's target margin, in units of the reward, beta * log-ratio
  Divergence divergence;
  double divergence_alpha;         // of kAlpha; not 1
  bool average_first;              // divide by the length before the divergence, not after it
  const void* policy_chosen;       // [P]
  const void* policy_rejected;     // [P]
  const void* reference_chosen;    // [P] or null: 0
  const void* reference_rejected;  // [P] or null: 0
  const void* chosen_lengths;      // [P] or null: 1; the loss sees averages over them
  const void* rejected_lengths;    // [P] or null: 1
  const void* margins;             // [P] or null: 0; added to `margin`
  const void* shift;               // [1] or null: 0; a reward taken off both rewards (bco_pair)
  const void* grad_losses;         // [P]; null in the forward pass
  // forward
  void* losses;            // [P]
  void* chosen_rewards;    // [P] beta * (policy - reference)
  void* rejected_rewards;  // [P]
  // backward
  void* grad_chosen;    // [P]
  void* grad_rejected;  // [P]
};

struct UnpairedLossParams {
  DType dtype;
  int loss;  // index into UnpairedLosses
  int64_t count;
  LossParams params;
  const void* policy;        // [N]
  const void* reference;     // [N] or null: 0
  const bool* is_desirable;  // [N]
  const void* kl;            // [1]
  const void* grad_losses;   // [N]; null in the forward pass
  // forward
  void* losses;   // [N]
  void* rewards;  // [N]
  // backward
  void* grad_policy;  // [N]
};

// Losses of a policy on one number a token (losses_policy.h). N tokens of S sequences, which follow
// one another.

struct PolicyOptions {
  double epsilon;       // the range of the ratio begins at 1 - epsilon
  double epsilon_high;  // and ends at 1 + epsilon_high; for cispo the largest ratio itself
  double delta;         // the largest ratio where the advantage is negative; infinity: none
  double sapo_temperature_pos, sapo_temperature_neg;
  double vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg;
};

enum class KlEstimator : int { kK1 = 0, kK2 = 1, kK3 = 2 };

struct PolicyLossParams {
  DType dtype;  // kFloat32 or kFloat64
  int loss;     // index into PolicyLosses
  int64_t tokens;
  int64_t sequences;
  PolicyOptions options;
  bool sequence_level;       // the ratio is that of the sequence, e^(mean of logp - old)
  bool sequence_means;       // a token weighs 1 / scored tokens of its sequence, else 1
  bool advantage_per_token;  // else one a sequence
  double beta;               // of the penalty
  KlEstimator kl_estimator;
  bool kl_with_ratio;      // the penalty of a token times its ratio
  const void* logps;       // [N]
  const void* old;         // [N] or null: logps
  const void* reference;   // [N] or null: no penalty
  const void* advantages;  // [N] or [S]
  const void* correction;  // [N] or null: 1; weighs the policy's term, not the penalty
  const bool* mask;        // [N] or null: all are scored
  const int64_t* offsets;  // [S + 1]
  void* sequence_losses;   // [S] sums of weight * loss over the scored tokens
  void* token_losses;      // [N]
  void* coefficients;      // [N] d sequence_loss / d logp
  void* kl;                // [N]
  void* ratios;            // [N]
  int8_t* clipped;         // [N]
};

// Generalized advantage estimation (Schulman et al. 2016, eq. 16) over B rows of T steps.
struct GaeParams {
  DType dtype;
  int64_t batch;
  int64_t length;
  double gamma;
  double lam;
  const void* rewards;      // [B, T]
  const void* values;       // [B, T]
  const void* last_values;  // [B] or null: 0; the value after the last step
  const bool* dones;        // [B, T] or null: the episode ends with this step
  const bool* mask;         // [B, T] or null: steps that are none are passed over
  void* advantages;         // [B, T]
};

}  // namespace pyfast_dpo
