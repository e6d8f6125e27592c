// Scaling in place by a factor that stays on the device: checks and dispatch to cuda/.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "torch/checks.h"
#include "torch/cuda_stream.h"

namespace pyfast_dpo {
namespace {

void scale_(const Tensor& values, const Tensor& factor_in) {
  const char* op = "pyfast_dpo::scale_";
  const DType dtype = float_dtype(op, "values", values);
  STD_TORCH_CHECK(values.is_contiguous(), op, ": values must be contiguous, got ",
                  describe(values));
  const Tensor factor = checked(op, "factor", factor_in, stat_scalar_type(dtype), {}, values);
  const ScaleParams params{dtype, values.numel(), values.mutable_data_ptr(),
                           factor.const_data_ptr()};
  launch_on_current_stream(op, values, [&](void* stream) { return cuda::scale(params, stream); });
}

}  // namespace
}  // namespace pyfast_dpo

STABLE_TORCH_LIBRARY_IMPL(pyfast_dpo, CUDA, m) { m.impl("scale_", TORCH_BOX(&pyfast_dpo::scale_)); }
