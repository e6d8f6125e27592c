// The one place that launches kernels: plain C++, no <<<>>>, so that g++ can compile the .cu files
// too.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/launch.h"

// Kernels walk their work with a grid stride, so a grid may be smaller than the work. The x
// dimension allows 2^31 - 1 blocks; tests lower the limit to exercise the walk.
#ifndef PFD_MAX_GRID
#define PFD_MAX_GRID 0x7fffffff
#endif

namespace pyfast_dpo::cuda {

// One block a work item, as far as the grid reaches. `work` is at least 1.
template <class... Formal, class... Actual>
inline int launch_kernel(void (*kernel)(Formal...), int64_t work, int threads, size_t shared_bytes,
                         Stream stream, const Actual&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(work, PFD_MAX_GRID)));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, static_cast<Formal>(arguments)...);
}

}  // namespace pyfast_dpo::cuda
