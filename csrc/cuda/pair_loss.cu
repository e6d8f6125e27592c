// Losses on one number a sequence: one thread a pair, every loss of the table in common/losses.h.
#include <cuda_runtime.h>
#include <math.h>

#include "common/losses.h"
#include "common/params.h"
#include "cuda/launch.h"
#include "cuda/launch_kernel.cuh"

namespace pyfast_dpo::cuda {
namespace {

constexpr int kThreads = 128;  // a batch has tens of pairs; small blocks spread thousands

template <class S>
__device__ __forceinline__ S at(const void* values, int64_t i) {
  return static_cast<const S*>(values)[i];
}

template <class S>
__device__ __forceinline__ S& slot(void* values, int64_t i) {
  return static_cast<S*>(values)[i];
}

template <class Loss, class S, bool kBackward>
__global__ void __launch_bounds__(kThreads, 1) pair_kernel(PairLossParams p) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < p.pairs; i += stride) {
    const PairOutcome<S> pair = evaluate_pair<Loss, S>(p, i);
    if constexpr (kBackward) {
      const S upstream = at<S>(p.grad_losses, i);
      slot<S>(p.grad_chosen, i) = upstream * pair.d_chosen;
      slot<S>(p.grad_rejected, i) = upstream * pair.d_rejected;
    } else {
      slot<S>(p.losses, i) = pair.loss;
      slot<S>(p.chosen_rewards, i) = S(p.params.beta) * pair.chosen;
      slot<S>(p.rejected_rewards, i) = S(p.params.beta) * pair.rejected;
    }
  }
}

template <class Loss, class S, bool kBackward>
__global__ void __launch_bounds__(kThreads, 1) unpaired_kernel(UnpairedLossParams p) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < p.count; i += stride) {
    const S logratio = at<S>(p.policy, i) - value_or<S>(p.reference, i, 0);
    const UnpairedValue<S> value =
        Loss::template eval<S>(logratio, p.is_desirable[i], at<S>(p.kl, 0), p.params);
    if constexpr (kBackward) {
      slot<S>(p.grad_policy, i) = at<S>(p.grad_losses, i) * value.d_logratio;
    } else {
      slot<S>(p.losses, i) = value.loss;
      slot<S>(p.rewards, i) = S(p.params.beta) * logratio;
    }
  }
}

int64_t blocks_for(int64_t count) { return (count + kThreads - 1) / kThreads; }

template <bool kBackward>
int launch_pairs(const PairLossParams& params, Stream stream) {
  if (params.pairs == 0) return cudaSuccess;
  int error = cudaErrorInvalidValue;  // of an index that is not in the table
  PairLosses::dispatch(params.loss, [&](auto loss) {
    using Loss = decltype(loss);
    const auto kernel = params.dtype == DType::kFloat64 ? pair_kernel<Loss, double, kBackward>
                                                        : pair_kernel<Loss, float, kBackward>;
    error = launch_kernel(kernel, blocks_for(params.pairs), kThreads, 0, stream, params);
  });
  return error;
}

template <bool kBackward>
int launch_unpaired(const UnpairedLossParams& params, Stream stream) {
  if (params.count == 0) return cudaSuccess;
  int error = cudaErrorInvalidValue;
  UnpairedLosses::dispatch(params.loss, [&](auto loss) {
    using Loss = decltype(loss);
    const auto kernel = params.dtype == DType::kFloat64 ? unpaired_kernel<Loss, double, kBackward>
                                                        : unpaired_kernel<Loss, float, kBackward>;
    error = launch_kernel(kernel, blocks_for(params.count), kThreads, 0, stream, params);
  });
  return error;
}

}  // namespace

int pair_loss_forward(const PairLossParams& params, Stream stream) {
  return launch_pairs<false>(params, stream);
}

int pair_loss_backward(const PairLossParams& params, Stream stream) {
  return launch_pairs<true>(params, stream);
}

int unpaired_loss_forward(const UnpairedLossParams& params, Stream stream) {
  return launch_unpaired<false>(params, stream);
}

int unpaired_loss_backward(const UnpairedLossParams& params, Stream stream) {
  return launch_unpaired<true>(params, stream);
}

}  // namespace pyfast_dpo::cuda
