// Products of float32 linear layers on the CPU: checks, allocation, tasks.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <utility>
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

// left [R, K] and right [K, N]; or what is given is the transpose of one of them.
struct Term {
  Tensor left, right;
  bool left_transposed = false, right_transposed = false;

  int64_t rows() const { return left.size(left_transposed ? 1 : 0); }
  int64_t depth() const { return left.size(left_transposed ? 0 : 1); }
  int64_t columns() const { return right.size(right_transposed ? 0 : 1); }
};

Term checked_term(const char* op, const char* left_name, const char* right_name, Term term) {
  STD_TORCH_CHECK(
      is_given(term.left) && is_given(term.right) && term.left.dim() == 2 && term.right.dim() == 2,
      op, ": arguments must be matrices, got ", describe(term.left), " and ", describe(term.right));
  std::vector<int64_t> shape{term.depth(), term.columns()};
  if (term.right_transposed) std::swap(shape[0], shape[1]);
  term.left = checked(op, left_name, term.left, ScalarType::Float, shape_of(term.left), term.left);
  term.right = checked(op, right_name, term.right, ScalarType::Float, shape, term.left);
  return term;
}

// That of the layer and, where given, that of an adapter.
std::vector<Term> checked_terms(const char* op, const char* name, const Tensor& left,
                                const Tensor& weight, const char* low_name,
                                const std::optional<Tensor>& low_left,
                                const std::optional<Tensor>& low_weight, bool transposed) {
  STD_TORCH_CHECK(low_left.has_value() == low_weight.has_value(), op, ": ", low_name,
                  " and low_weight go together");
  std::vector<Term> terms{checked_term(op, name, "weight", {left, weight, false, transposed})};
  if (!low_left.has_value()) return terms;
  const Term low =
      checked_term(op, low_name, "low_weight", {*low_left, *low_weight, false, transposed});
  check_shape(op, low_name, low.left, ScalarType::Float, {terms[0].rows(), low.depth()}, left);
  std::vector<int64_t> shape{low.depth(), terms[0].columns()};
  if (transposed) std::swap(shape[0], shape[1]);
  check_shape(op, "low_weight", low.right, ScalarType::Float, shape, left);
  terms.push_back(low);
  return terms;
}

// out = the sum of one or two products, in one pass: the second one continues the depth of the
// first.
void write_sum(Tensor out, const std::vector<Term>& terms) {
  LinearParams p{};
  p.rows = terms[0].rows();
  p.columns = terms[0].columns();
  p.depth = terms[0].depth();
  p.left = data(terms[0].left);
  p.left_transposed = terms[0].left_transposed;
  if (terms.size() > 1) {
    p.low = terms[1].depth();
    p.low_left = data(terms[1].left);
  }
  p.out = floats(out);
  const int64_t depth = p.depth + p.low;
  if (p.rows == 0 || p.columns == 0) return;
  if (depth == 0) {
    torch::stable::zero_(out);
    return;
  }
  const cpu::Linear& linear = cpu_kernels().linear;
  const int64_t tiles = divide_up(p.columns, linear.columns);
  const Tensor packed_columns = new_floats(out, tiles * linear.columns * depth);
  p.packed_columns = floats(packed_columns);
  with_workspace(out, tiles, 0, [&](int64_t tile, float*) {
    float* to = floats(packed_columns) + tile * linear.columns * depth;
    for (const Term& term : terms) {
      const auto pack = term.right_transposed ? linear.pack_transposed : linear.pack_columns;
      pack(data(term.right), tile, term.depth(), p.columns, to);
      to += linear.columns * term.depth();
    }
  });
  // Every task packs its rows again, so columns are divided only where there are few blocks of
  // rows.
  const int64_t panels = divide_up(p.rows, linear.rows), groups = divide_up(tiles, linear.tiles);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t blocks = std::min(panels, threads * divide_up(panels, threads * linear.row_block));
  const int64_t wanted = divide_up(2 * threads, blocks);
  const int64_t width = divide_up(groups, std::min(groups, wanted)) * linear.tiles;
  const int64_t parts = divide_up(tiles, width);
  with_workspace(out, blocks * parts, linear.workspace(p.depth, p.low),
                 [&](int64_t task, float* workspace) {
                   const int64_t block = task / parts, first = task % parts * width;
                   linear.product(p, block * panels / blocks, (block + 1) * panels / blocks, first,
                                  std::min(first + width, tiles), workspace);
                 });
}

void linear_(const Tensor& out, const Tensor& rows, const Tensor& weight,
             const std::optional<Tensor>& low_rows, const std::optional<Tensor>& low_weight) {
  const char* op = "pyfast_dpo::linear_";
  const std::vector<Term> terms =
      checked_terms(op, "rows", rows, weight, "low_rows", low_rows, low_weight, true);
  check_shape(op, "out", out, ScalarType::Float, {terms[0].rows(), terms[0].columns()}, rows);
  STD_TORCH_CHECK(out.is_contiguous(), op, ": out must be contiguous, got ", describe(out));
  std::vector<const Tensor*> read{&rows, &weight};
  if (low_rows.has_value()) read.insert(read.end(), {&*low_rows, &*low_weight});
  check_apart(op, "out", out, read);
  write_sum(out, terms);
}

Tensor written(const std::vector<Term>& terms) {
  const Tensor out = torch::stable::new_empty(terms[0].left, {terms[0].rows(), terms[0].columns()});
  write_sum(out, terms);
  return out;
}

Tensor linear_grad_rows(const Tensor& gradient, const Tensor& weight,
                        const std::optional<Tensor>& low_gradient,
                        const std::optional<Tensor>& low_weight) {
  return written(checked_terms("pyfast_dpo::linear_grad_rows", "gradient", gradient, weight,
                               "low_gradient", low_gradient, low_weight, false));
}

Tensor linear_grad_weight(const Tensor& gradient, const Tensor& rows) {
  return written({checked_term("pyfast_dpo::linear_grad_weight", "gradient", "rows",
                               {gradient, rows, true, false})});
}

}  // namespace
}  // namespace pyfast_dpo

STABLE_TORCH_LIBRARY_IMPL(pyfast_dpo, CPU, m) {
  m.impl("linear_", TORCH_BOX(&pyfast_dpo::linear_));
  m.impl("linear_grad_rows", TORCH_BOX(&pyfast_dpo::linear_grad_rows));
  m.impl("linear_grad_weight", TORCH_BOX(&pyfast_dpo::linear_grad_weight));
}
