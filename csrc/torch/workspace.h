// Tasks on torch's threads, each thread with memory of its own.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <atomic>
#include <cstdint>

namespace pyfast_dpo {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline torch::stable::Tensor new_floats(const torch::stable::Tensor& like, int64_t count) {
  return torch::stable::new_empty(like, {count}, torch::headeronly::ScalarType::Float);
}

inline float* floats(const torch::stable::Tensor& tensor) {
  return static_cast<float*>(tensor.mutable_data_ptr());
}

// Runs task(index, workspace) for every index, each thread with `floats_each` floats of its own.
template <class Task>
inline void with_workspace(const torch::stable::Tensor& like, int64_t tasks, int64_t floats_each,
                           const Task& task) {
  const int64_t threads = torch::stable::get_num_threads();
  const torch::stable::Tensor workspace = new_floats(like, threads * floats_each);
  std::atomic<int64_t> next_workspace{0}, next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    float* own = floats(workspace) + next_workspace++ * floats_each;
    for (int64_t i = next++; i < tasks; i = next++) task(i, own);
  });
}

}  // namespace pyfast_dpo
