// What this binary was built with, and the names of CUDA's errors.
#include <cuda_runtime.h>

#include <string>

#include "cuda/launch.h"

namespace pyfast_dpo::cuda {

bool is_built() { return true; }

const char* error_string(int code) {
  return code == kNotBuilt ? "this build has no CUDA kernels"
                           : cudaGetErrorString(static_cast<cudaError_t>(code));
}

const char* built_architectures() {
  static const std::string names = [] {
    std::string text;
    for (const int arch : {__CUDA_ARCH_LIST__}) {  // nvcc's own list: 800, 900, ...
      if (!text.empty()) text += ';';
      text += std::to_string(arch / 10);
    }
    return text;
  }();
  return names.c_str();
}

int runtime_version() { return CUDART_VERSION; }

}  // namespace pyfast_dpo::cuda
