// Products of float32 linear layers on the CPU: checks, allocation, tasks.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/kernels.h"
#include "torch/checks.h"
#include "torch/cpu_driver.h"
#include "torch/workspace.h"

namespace pyfast_dpo {
namespace {

const float* data(const Tensor& tensor) {
  return static_cast<const float*>(tensor.const_data_ptr());
}

// rows [R, K] and the weight of a layer, [N, K] where transposed, else [K, N].
struct Term {
  Tensor rows, weight;
  int64_t depth;
};

Term checked_term(const char* op, const char* rows_name, const Tensor& rows,
                  const char* weight_name, const Tensor& weight, bool transposed, int64_t count,
                  int64_t columns) {
  const int64_t depth = rows.dim() == 2 ? rows.size(1) : -1;
  const std::vector<int64_t> shape =
      transposed ? std::vector<int64_t>{columns, depth} : std::vector<int64_t>{depth, columns};
  return {checked(op, rows_name, rows, ScalarType::Float, {count, depth}, rows),
          checked(op, weight_name, weight, ScalarType::Float, shape, rows), depth};
}

// The sum of one or two such products, in one pass: the second one continues the depth of the
// first.
Tensor product(const std::vector<Term>& terms, int64_t columns, bool transposed) {
  const Tensor& like = terms[0].rows;
  LinearParams p{};
  p.rows = like.size(0);
  p.columns = columns;
  p.depth = terms[0].depth;
  p.left = data(terms[0].rows);
  if (terms.size() > 1) {
    p.low = terms[1].depth;
    p.low_left = data(terms[1].rows);
  }
  Tensor out = torch::stable::new_empty(like, {p.rows, p.columns});
  const int64_t depth = p.depth + p.low;
  if (p.rows == 0 || p.columns == 0) return out;
  if (depth == 0) return torch::stable::zero_(out);
  const cpu::Linear& linear = cpu_kernels().linear;
  const int64_t tiles = divide_up(p.columns, linear.columns);
  const Tensor packed_columns = new_floats(like, tiles * linear.columns * depth);
  p.packed_columns = floats(packed_columns);
  p.out = floats(out);
  const auto pack_tile = transposed ? linear.pack_transposed : linear.pack_columns;
  with_workspace(like, tiles, 0, [&](int64_t tile, float*) {
    float* to = floats(packed_columns) + tile * linear.columns * depth;
    for (const Term& term : terms) {
      pack_tile(data(term.weight), tile, term.depth, p.columns, to);
      to += linear.columns * term.depth;
    }
  });
  // Every task packs its rows again, so columns are divided only where there are few blocks of
  // rows.
  const int64_t panels = divide_up(p.rows, linear.rows), groups = divide_up(tiles, linear.tiles);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t blocks = std::min(panels, threads * divide_up(panels, threads * linear.row_block));
  const int64_t wanted = divide_up(4 * threads, blocks);
  const int64_t width = divide_up(groups, std::min(groups, wanted)) * linear.tiles;
  const int64_t parts = divide_up(tiles, width);
  with_workspace(like, blocks * parts, linear.workspace(p.depth, p.low),
                 [&](int64_t task, float* workspace) {
                   const int64_t block = task / parts, first = task % parts * width;
                   linear.product(p, block * panels / blocks, (block + 1) * panels / blocks, first,
                                  std::min(first + width, tiles), workspace);
                 });
  return out;
}

Tensor sum_of_products(const char* op, const Tensor& rows, const Tensor& weight,
                       const std::optional<Tensor>& low_rows,
                       const std::optional<Tensor>& low_weight, bool transposed) {
  STD_TORCH_CHECK(rows.dim() == 2 && weight.dim() == 2, op, ": arguments must be matrices, got ",
                  describe(rows), " and ", describe(weight));
  STD_TORCH_CHECK(low_rows.has_value() == low_weight.has_value(), op,
                  ": low_rows and low_weight go together");
  const int64_t count = rows.size(0), columns = weight.size(transposed ? 0 : 1);
  std::vector<Term> terms{
      checked_term(op, "rows", rows, "weight", weight, transposed, count, columns)};
  if (low_rows.has_value()) {
    terms.push_back(checked_term(op, "low_rows", *low_rows, "low_weight", *low_weight, transposed,
                                 count, columns));
  }
  return product(terms, columns, transposed);
}

Tensor linear(const Tensor& rows, const Tensor& weight, const std::optional<Tensor>& low_rows,
              const std::optional<Tensor>& low_weight) {
  return sum_of_products("pyfast_dpo::linear", rows, weight, low_rows, low_weight, true);
}

Tensor linear_grad_rows(const Tensor& gradient, const Tensor& weight,
                        const std::optional<Tensor>& low_gradient,
                        const std::optional<Tensor>& low_weight) {
  return sum_of_products("pyfast_dpo::linear_grad_rows", gradient, weight, low_gradient, low_weight,
                         false);
}

}  // namespace
}  // namespace pyfast_dpo

STABLE_TORCH_LIBRARY_IMPL(pyfast_dpo, CPU, m) {
  m.impl("linear", TORCH_BOX(&pyfast_dpo::linear));
  m.impl("linear_grad_rows", TORCH_BOX(&pyfast_dpo::linear_grad_rows));
}
