// Attention over a row of shared prompts on the CPU: checks, allocation, tasks.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "torch/checks.h"
#include "torch/cpu_driver.h"
#include "torch/workspace.h"

namespace pyfast_dpo {
namespace {

// A tensor whose heads are contiguous, and where they are.
Tensor with_heads(const Tensor& tensor, HeadsView& view) {
  const Tensor kept =
      tensor.stride(2) == 1 || tensor.size(2) == 1 ? tensor : torch::stable::contiguous(tensor);
  view = {kept.const_data_ptr(), kept.stride(0), kept.stride(1)};
  return kept;
}

// The arguments of both passes, and what they point to.
struct Call {
  AttentionParams params;
  Tensor query, key, value, blocks;
  std::vector<int64_t> groups;  // the first block of each, and the number of blocks
  int64_t most_keys = 0;        // of a block
  int64_t most_tokens = 0;      // of a group

  int64_t block_count() const { return groups.back(); }
  int type() const { return static_cast<int>(params.dtype); }
};

// Blocks must lie one after the other and fill the row: nothing is read or written beyond it.
void check_blocks(const char* op, Call& call) {
  const AttentionBlock* blocks = call.params.blocks;
  const int64_t count = call.blocks.size(0);
  int64_t place = 0;
  for (int64_t n = 0; n < count; ++n) {
    const AttentionBlock& b = blocks[n];
    const bool begins = b.prompt_count == 0;
    if (begins) call.groups.push_back(n);
    const bool good = b.first == place && b.count > 0 && b.count <= call.params.tokens - place &&
                      (begins || (b.prompt_count > 0 && !call.groups.empty() &&
                                  b.prompt_first == blocks[call.groups.back()].first &&
                                  b.prompt_count <= blocks[call.groups.back()].count));
    STD_TORCH_CHECK(good, op, ": blocks must follow one another in the row of ", call.params.tokens,
                    " tokens, and a prompt must be the beginning of its group's first block, got "
                    "block ",
                    n, " = [", b.first, ", ", b.count, ", ", b.prompt_first, ", ", b.prompt_count,
                    "] after ", place, " tokens");
    place += b.count;
    call.most_keys = std::max(call.most_keys, b.prompt_count + b.count);
    call.most_tokens = std::max(call.most_tokens, place - blocks[call.groups.back()].first);
  }
  STD_TORCH_CHECK(place == call.params.tokens, op, ": blocks must fill the row of ",
                  call.params.tokens, " tokens, got ", place);
  call.groups.push_back(count);
}

Call checked_call(const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
                  const Tensor& blocks, double scale, int64_t window) {
  STD_TORCH_CHECK(is_given(query) && is_given(key) && query.dim() == 3 && key.dim() == 3, op,
                  ": query and key must be [T, heads, D], got ", describe(query), " and ",
                  describe(key));
  Call call{};
  AttentionParams& p = call.params;
  p.dtype = float_dtype(op, "query", query);
  STD_TORCH_CHECK(p.dtype != DType::kFloat64, op, ": float64 is not supported");
  p.tokens = query.size(0);
  p.heads = query.size(1);
  p.key_heads = key.size(1);
  p.width = query.size(2);
  STD_TORCH_CHECK(p.width > 0 && p.key_heads > 0 && p.heads % p.key_heads == 0, op,
                  ": D must be positive and the heads of the query a multiple of those of the key, "
                  "got ",
                  describe(query), " and ", describe(key));
  // in float32, in which the scores are
  const auto scale_of_scores = static_cast<float>(scale);
  STD_TORCH_CHECK(scale_of_scores > 0 && std::isfinite(scale_of_scores), op,
                  ": scale must be positive and finite, got ", scale);
  STD_TORCH_CHECK(window > 0, op, ": window must be positive, got ", window);
  const std::vector<int64_t> shape{p.tokens, p.key_heads, p.width};
  check_shape(op, "key", key, query.scalar_type(), shape, query);
  check_shape(op, "value", value, query.scalar_type(), shape, query);
  STD_TORCH_CHECK(is_given(blocks) && blocks.scalar_type() == ScalarType::Long &&
                      blocks.dim() == 2 && blocks.size(1) == 4 && !blocks.is_cuda(),
                  op, ": blocks must be int64 [B, 4] on the CPU, got ", describe(blocks));
  call.query = with_heads(query, p.query);
  call.key = with_heads(key, p.key);
  call.value = with_heads(value, p.value);
  call.blocks = torch::stable::contiguous(blocks);
  p.blocks = static_cast<const AttentionBlock*>(call.blocks.const_data_ptr());
  p.scale = scale_of_scores;
  p.window = window;
  check_blocks(op, call);
  return call;
}

std::tuple<Tensor, Tensor> shared_prompt_attention(const Tensor& query, const Tensor& key,
                                                   const Tensor& value, const Tensor& blocks,
                                                   double scale, int64_t window) {
  Call call =
      checked_call("pyfast_dpo::shared_prompt_attention", query, key, value, blocks, scale, window);
  AttentionParams& p = call.params;
  Tensor output = torch::stable::new_empty(query, {p.tokens, p.heads, p.width});
  Tensor log_sums = torch::stable::new_empty(query, {p.heads, p.tokens}, ScalarType::Float);
  p.output = output.mutable_data_ptr();
  p.log_sums = floats(log_sums);
  const cpu::Attention& attention = cpu_kernels().attention;
  with_workspace(query, call.block_count() * p.key_heads,
                 attention.forward_size(call.most_keys, p.width), [&](int64_t task, float* own) {
                   attention.forward[call.type()](p, task / p.key_heads, task % p.key_heads, own);
                 });
  return {output, log_sums};
}

std::tuple<Tensor, Tensor, Tensor> shared_prompt_attention_backward(
    const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& output_in, const Tensor& log_sums_in, const Tensor& blocks, double scale,
    int64_t window) {
  const char* op = "pyfast_dpo::shared_prompt_attention_backward";
  Call call = checked_call(op, query, key, value, blocks, scale, window);
  AttentionParams& p = call.params;
  const std::vector<int64_t> shape{p.tokens, p.heads, p.width};
  check_shape(op, "grad_output", grad_output, query.scalar_type(), shape, query);
  const Tensor gradient = with_heads(grad_output, p.grad_output);
  const Tensor output = checked(op, "output", output_in, query.scalar_type(), shape, query);
  const Tensor log_sums =
      checked(op, "log_sums", log_sums_in, ScalarType::Float, {p.heads, p.tokens}, query);
  p.output = output.mutable_data_ptr();
  p.log_sums = floats(log_sums);
  Tensor grad_query = torch::stable::new_empty(query, {p.tokens, p.heads, p.width});
  Tensor grad_key = torch::stable::new_empty(query, {p.tokens, p.key_heads, p.width});
  Tensor grad_value = torch::stable::new_empty(query, {p.tokens, p.key_heads, p.width});
  p.grad_query = grad_query.mutable_data_ptr();
  p.grad_key = grad_key.mutable_data_ptr();
  p.grad_value = grad_value.mutable_data_ptr();
  const cpu::Attention& attention = cpu_kernels().attention;
  const auto group_count = static_cast<int64_t>(call.groups.size()) - 1;
  with_workspace(query, group_count * p.key_heads,
                 attention.backward_size(call.most_keys, call.most_tokens, p.width),
                 [&](int64_t task, float* own) {
                   const auto group = static_cast<size_t>(task / p.key_heads);
                   attention.backward[call.type()](p, call.groups[group], call.groups[group + 1],
                                                   task % p.key_heads, own);
                 });
  return {grad_query, grad_key, grad_value};
}

}  // namespace
}  // namespace pyfast_dpo

STABLE_TORCH_LIBRARY_IMPL(pyfast_dpo, CPU, m) {
  m.impl("shared_prompt_attention", TORCH_BOX(&pyfast_dpo::shared_prompt_attention));
  m.impl("shared_prompt_attention_backward",
         TORCH_BOX(&pyfast_dpo::shared_prompt_attention_backward));
}
