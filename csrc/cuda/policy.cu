// Policy losses: one block a sequence, which walks its tokens two or three times. Advantages: one
// thread a row.
#include <cuda_runtime.h>
#include <math.h>

#include "common/gae.h"
#include "common/losses.h"
#include "common/params.h"
#include "cuda/launch.h"
#include "cuda/launch_kernel.cuh"
#include "cuda/reduce.cuh"

namespace pyfast_dpo::cuda {
namespace {

constexpr int kThreads = 128;

// Two sums and a count over the tokens of a sequence.
struct Sums {
  double first = 0, second = 0;
  long long count = 0;

  __device__ __forceinline__ Sums merge(const Sums& other) const {
    return {first + other.first, second + other.second, count + other.count};
  }

  __device__ __forceinline__ Sums from_lane_above(int distance) const {
    return {__shfl_down_sync(kAllLanes, first, distance),
            __shfl_down_sync(kAllLanes, second, distance),
            __shfl_down_sync(kAllLanes, count, distance)};
  }
};

// The block's sums, for every thread of it.
__device__ __forceinline__ Sums everywhere(Sums sums) {
  sums = block_reduce<kThreads>(sums);
  Sums* slot = reinterpret_cast<Sums*>(block_scratch);
  if (threadIdx.x == 0) *slot = sums;
  __syncthreads();
  sums = *slot;
  __syncthreads();  // read by all before the next reduction takes the scratch
  return sums;
}

template <class Loss, class S>
__global__ void __launch_bounds__(kThreads, 1) policy_kernel(PolicyLossParams p) {
  S* coefficients = static_cast<S*>(p.coefficients);
  for (int64_t sequence = blockIdx.x; sequence < p.sequences; sequence += gridDim.x) {
    const Range range = tokens_of(p, sequence);
    Sums own;
    for (int64_t t = range.first + threadIdx.x; t < range.last; t += kThreads) {
      if (!is_scored(p, t)) continue;
      ++own.count;
      own.first += Loss::kCorrectsRatio ? bounded_log_ratio_at<S>(p, t) : log_ratio_at<S>(p, t);
    }
    const Sums ratios = everywhere(own);
    const double count = static_cast<double>(ratios.count > 0 ? ratios.count : 1);
    const S log_ratio = S(Loss::kOfSum ? ratios.first : ratios.first / count);
    const double weight = p.sequence_means ? 1 / count : 1;
    own = Sums{};
    for (int64_t t = range.first + threadIdx.x; t < range.last; t += kThreads) {
      if (!is_scored(p, t)) {
        write_unscored_token<S>(p, t);
        continue;
      }
      const PolicyValue<S> value = evaluate_policy_token<Loss, S>(p, t, sequence, log_ratio);
      own.first += value.loss;
      own.second += value.d_log_ratio;
      coefficients[t] = S(weight) * (value.d_logp + (p.sequence_level ? S(0) : value.d_log_ratio));
    }
    const Sums totals = everywhere(own);
    if (threadIdx.x == 0) static_cast<S*>(p.sequence_losses)[sequence] = S(weight * totals.first);
    if (!p.sequence_level) continue;
    const S shared = S(weight * (Loss::kOfSum ? totals.second : totals.second / count));
    for (int64_t t = range.first + threadIdx.x; t < range.last; t += kThreads) {
      if (is_scored(p, t)) coefficients[t] += shared;
    }
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads, 1) gae_kernel(GaeParams p) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x; row < p.batch; row += stride) {
    gae_of_row<S>(p, row);
  }
}

}  // namespace

int policy_loss(const PolicyLossParams& params, Stream stream) {
  if (params.sequences == 0) return cudaSuccess;
  int error = cudaErrorInvalidValue;  // of an index that is not in the table
  PolicyLosses::dispatch(params.loss, [&](auto loss) {
    using Loss = decltype(loss);
    const auto kernel =
        params.dtype == DType::kFloat64 ? policy_kernel<Loss, double> : policy_kernel<Loss, float>;
    error = launch_kernel(kernel, params.sequences, kThreads, block_reduce_bytes<kThreads, Sums>(),
                          stream, params);
  });
  return error;
}

int gae(const GaeParams& params, Stream stream) {
  if (params.batch == 0) return cudaSuccess;
  const auto kernel = params.dtype == DType::kFloat64 ? gae_kernel<double> : gae_kernel<float>;
  return launch_kernel(kernel, (params.batch + kThreads - 1) / kThreads, kThreads, 0, stream,
                       params);
}

}  // namespace pyfast_dpo::cuda
