// The lm_head's three matrix products on the CPU, with float32 sums whatever the inputs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <vector>

#include "cpu/kernels.h"
#include "torch/checks.h"
#include "torch/cpu_driver.h"
#include "torch/workspace.h"

namespace pyfast_dpo {
namespace {

// Parts of the vocabulary with sums of their own in head_grad_rows: a fixed number, so that results
// do not depend on the number of threads.
constexpr int64_t kSlices = 8;

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Maps memory that is about to be written, where it is fresh: one call, instead of a fault for
// every page, takes two thirds of the time. Where it is not, or cannot be mapped so, nothing
// happens.
void map_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_POPULATE_WRITE)
  static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory) / page * page;
  const uintptr_t end = reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_POPULATE_WRITE);
#else
  (void)memory, (void)bytes;
#endif
}

struct Shapes {
  int64_t rows, hidden, vocab;
};

HeadParams head_params(const char* op, const Tensor& typed, const Tensor& weight, Shapes shapes) {
  HeadParams params{};
  params.dtype = float_dtype(op, "rows or weight", typed);
  STD_TORCH_CHECK(params.dtype != DType::kFloat64, op, ": float64 is not supported");
  params.rows = shapes.rows;
  params.hidden = shapes.hidden;
  params.vocab = shapes.vocab;
  params.weight = weight.const_data_ptr();
  return params;
}

void check_matrices(const char* op, const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(is_given(a) && is_given(b) && a.dim() == 2 && b.dim() == 2, op,
                  ": arguments must be matrices, got ", describe(a), " and ", describe(b));
}

void check_writable(const char* op, const Tensor& out) {
  STD_TORCH_CHECK(out.is_contiguous(), op, ": out must be contiguous, got ", describe(out));
}

// out [R, V] float32 = rows [R, H] weight [V, H]^T
void head_logits_(const Tensor& out, const Tensor& rows_in, const Tensor& weight_in) {
  const char* op = "pyfast_dpo::head_logits_";
  check_matrices(op, rows_in, weight_in);
  const Shapes shapes{rows_in.size(0), rows_in.size(1), weight_in.size(0)};
  const Tensor rows = torch::stable::contiguous(rows_in);
  const Tensor weight =
      checked(op, "weight", weight_in, rows.scalar_type(), {shapes.vocab, shapes.hidden}, rows);
  checked(op, "out", out, ScalarType::Float, {shapes.rows, shapes.vocab}, rows);
  check_writable(op, out);
  check_apart(op, "out", out, {&rows_in, &weight_in});
  HeadParams params = head_params(op, rows, weight, shapes);
  const cpu::Gemm& gemm = cpu_kernels().gemm;
  const int type = static_cast<int>(params.dtype);
  const Tensor packed =
      new_floats(rows, divide_up(shapes.rows, gemm.rows) * gemm.left_size[type](shapes.hidden));
  gemm.pack_rows[type](rows.const_data_ptr(), shapes.rows, shapes.hidden, floats(packed));
  params.packed_rows = floats(packed);
  params.logits = floats(out);
  with_workspace(rows, divide_up(shapes.vocab, gemm.columns), gemm.right_size[type](shapes.hidden),
                 [&](int64_t tile, float* own) { gemm.logits_tile[type](params, tile, own); });
}

// Of the logits, [R, V]: columns of a larger matrix need no copy.
Tensor checked_gradient(const char* op, const Tensor& gradient, Shapes shapes,
                        const Tensor& typed) {
  const ScalarType type = gradient.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || (type == ScalarType::BFloat16 && typed.scalar_type() == type),
      op, ": gradient must be float32, or bfloat16 where the other matrix is, got ",
      describe(gradient));
  check_shape(op, "gradient", gradient, type, {shapes.rows, shapes.vocab}, typed);
  return gradient.stride(1) == 1 ? gradient : torch::stable::contiguous(gradient);
}

// Returns which products take it: 0 for a float32 one, 1 for one in the dtype of a bfloat16 head.
int set_gradient(const Tensor& gradient, HeadParams& params) {
  params.gradient = gradient.const_data_ptr();
  params.gradient_stride = gradient.stride(0);
  return gradient.scalar_type() == ScalarType::Float ? 0 : 1;
}

// gradient [R, V] float32 or bfloat16, weight [V, H] -> gradient weight [R, H] float32
Tensor head_grad_rows(const Tensor& gradient_in, const Tensor& weight_in) {
  const char* op = "pyfast_dpo::head_grad_rows";
  check_matrices(op, gradient_in, weight_in);
  const Shapes shapes{gradient_in.size(0), weight_in.size(1), weight_in.size(0)};
  const Tensor weight = torch::stable::contiguous(weight_in);
  const Tensor gradient = checked_gradient(op, gradient_in, shapes, weight);
  HeadParams params = head_params(op, weight, weight, shapes);
  const cpu::Gemm& gemm = cpu_kernels().gemm;
  const int type = static_cast<int>(params.dtype);
  const int kind = set_gradient(gradient, params);
  if (shapes.rows == 0 || shapes.hidden == 0 || shapes.vocab == 0) {  // no term in any sum
    const Tensor zeros =
        torch::stable::new_empty(weight, {shapes.rows, shapes.hidden}, ScalarType::Float);
    return torch::stable::zero_(const_cast<Tensor&>(zeros));
  }
  // The weight is read once, whatever the number of threads: slices of the vocabulary have sums of
  // their own, which are added in order. Rows are divided only when there are more threads.
  const int64_t slice =
      divide_up(divide_up(shapes.vocab, kSlices), gemm.depth[type]) * gemm.depth[type];
  const int64_t slices = divide_up(shapes.vocab, slice);
  const int64_t panels = divide_up(shapes.rows, gemm.rows);
  const int64_t parts = divide_up(torch::stable::get_num_threads(), slices);
  const int64_t each = divide_up(panels, parts) * gemm.rows;
  const int64_t size = shapes.rows * shapes.hidden;
  const Tensor sums =
      torch::stable::new_empty(weight, {slices, shapes.rows, shapes.hidden}, ScalarType::Float);
  const int64_t tasks = each == 0 ? 0 : slices * divide_up(shapes.rows, each);
  with_workspace(weight, tasks,
                 each / gemm.rows * gemm.left_size[type](gemm.depth[type]) +
                     gemm.strip * gemm.right_size[type](gemm.depth[type]),
                 [&](int64_t task, float* own) {
                   const int64_t first = task / slices * each, entry = task % slices * slice;
                   HeadParams part = params;
                   part.grad_rows = floats(sums) + task % slices * size;
                   gemm.gradient_of_rows[kind][type](part, first, least(first + each, shapes.rows),
                                                     entry, least(entry + slice, shapes.vocab),
                                                     own);
                 });
  const Tensor result =
      torch::stable::new_empty(weight, {shapes.rows, shapes.hidden}, ScalarType::Float);
  const float* part = floats(sums);
  float* total = floats(result);
  torch::stable::parallel_for(0, size, 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float sum = part[i];
      for (int64_t k = 1; k < slices; ++k) sum += part[k * size + i];
      total[i] = sum;
    }
  });
  return result;
}

// out [V, H], float32 or of the dtype of rows, = gradient [R, V]^T rows [R, H]; accumulate: added
// to out, which is float32; total float32: added, where out is not float32.
void head_grad_weight_(const Tensor& out, const Tensor& gradient_in, const Tensor& rows_in,
                       bool accumulate, const std::optional<Tensor>& total_in) {
  const char* op = "pyfast_dpo::head_grad_weight_";
  check_matrices(op, gradient_in, rows_in);
  const Shapes shapes{rows_in.size(0), rows_in.size(1), gradient_in.size(1)};
  const Tensor rows = torch::stable::contiguous(rows_in);
  const Tensor gradient = checked_gradient(op, gradient_in, shapes, rows);
  const std::vector<int64_t> shape{shapes.vocab, shapes.hidden};
  const bool wide = !is_given(out) || out.scalar_type() == ScalarType::Float;
  checked(op, "out", out, wide ? ScalarType::Float : rows.scalar_type(), shape, rows);
  check_writable(op, out);
  const auto total = checked(op, "total", total_in, ScalarType::Float, shape, rows);
  std::vector<const Tensor*> read{&gradient_in, &rows_in};
  if (total_in.has_value()) read.push_back(&*total_in);
  check_apart(op, "out", out, read);
  STD_TORCH_CHECK(wide ? !total.has_value() : !accumulate, op,
                  ": accumulate is for a float32 out, total for any other, got ", describe(out));
  HeadParams params = head_params(op, rows, rows, shapes);
  const cpu::Gemm& gemm = cpu_kernels().gemm;
  const int type = static_cast<int>(params.dtype);
  const Tensor packed =
      new_floats(rows, divide_up(shapes.hidden, gemm.columns) * gemm.right_size[type](shapes.rows));
  gemm.pack_right[type](rows.const_data_ptr(), shapes.rows, shapes.hidden, floats(packed));
  params.packed_columns = floats(packed);
  const int kind = set_gradient(gradient, params);
  params.grad_weight = out.mutable_data_ptr();
  params.total = accumulate ? floats(out) : total.has_value() ? floats(*total) : nullptr;
  const auto row_bytes = static_cast<int64_t>(out.element_size()) * shapes.hidden;
  const auto work = (wide ? gemm.gradient_of_weight : gemm.narrow_gradient_of_weight)[kind][type];
  with_workspace(rows, divide_up(shapes.vocab, gemm.panels * gemm.rows),
                 gemm.panels * gemm.left_size[type](shapes.rows), [&](int64_t block, float* own) {
                   const int64_t first = block * gemm.panels * gemm.rows;
                   const int64_t entries = least(gemm.panels * gemm.rows, shapes.vocab - first);
                   if (!accumulate) {
                     map_pages(static_cast<char*>(params.grad_weight) + first * row_bytes,
                               entries * row_bytes);
                   }
                   work(params, block, own);
                 });
}

}  // namespace
}  // namespace pyfast_dpo

STABLE_TORCH_LIBRARY_IMPL(pyfast_dpo, CPU, m) {
  m.impl("head_logits_", TORCH_BOX(&pyfast_dpo::head_logits_));
  m.impl("head_grad_rows", TORCH_BOX(&pyfast_dpo::head_grad_rows));
  m.impl("head_grad_weight_", TORCH_BOX(&pyfast_dpo::head_grad_weight_));
}
