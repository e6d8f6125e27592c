// Launching on torch's current CUDA stream without linking libtorch_cuda.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "cuda/launch.h"

// In libtorch_cuda. Weak: with a CPU-only torch the loader leaves it null and the extension still
// imports.
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream)
    __attribute__((weak));

namespace pyfast_dpo {

inline bool cuda_stream_available() { return aoti_torch_get_current_cuda_stream != nullptr; }

// Calls launcher(stream) with the device of `tensor` current, and turns its error code into an
// exception.
template <class Launcher>
inline void launch_on_current_stream(const char* op, const torch::stable::Tensor& tensor,
                                     Launcher&& launcher) {
  STD_TORCH_CHECK(cuda::is_built(), op,
                  ": this build of pyfast_dpo has no CUDA kernels (nvcc was not found, or "
                  "PYFAST_DPO_CUDA=0)");
  STD_TORCH_CHECK(cuda_stream_available(), op, ": this torch has no CUDA support");
  const int32_t device = tensor.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0, op,
                  ": torch gave no current CUDA stream for device ", device);
  const int code = launcher(stream);
  STD_TORCH_CHECK(code == 0, op, ": CUDA launch failed with code ", code, ": ",
                  cuda::error_string(code));
}

}  // namespace pyfast_dpo
