// Statistics of the rows of logits [R, V] (RowStatisticsParams). One block a row: its maximum,
// where that is not known, then the sums relative to it. A row of 128256 floats on every
// multiprocessor is more than the L2 cache holds, so a second pass reads memory again.
#include <cuda_runtime.h>
#include <math.h>

#include <cstdint>

#include "common/params.h"
#include "cuda/launch.h"
#include "cuda/launch_kernel.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"

namespace pyfast_dpo::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kInFlight = 4;  // 16-byte loads that a thread issues before it uses the first

template <class S>
struct Peak {
  S top = -S(INFINITY);

  __device__ __forceinline__ Peak merge(const Peak& other) const { return {fmax(top, other.top)}; }

  __device__ __forceinline__ Peak from_lane_above(int distance) const {
    return {__shfl_down_sync(kAllLanes, top, distance)};
  }
};

// Sums of e = exp(z - peak), of (z - peak) e, of e^2 and of z. fmax drops a NaN, these keep it.
template <class S>
struct Moments {
  S total = 0, moment = 0, squares = 0, logits = 0;

  __device__ __forceinline__ Moments merge(const Moments& other) const {
    return {total + other.total, moment + other.moment, squares + other.squares,
            logits + other.logits};
  }

  __device__ __forceinline__ Moments from_lane_above(int distance) const {
    return {__shfl_down_sync(kAllLanes, total, distance),
            __shfl_down_sync(kAllLanes, moment, distance),
            __shfl_down_sync(kAllLanes, squares, distance),
            __shfl_down_sync(kAllLanes, logits, distance)};
  }
};

// Calls use(z[v]) for this thread's share of a row: groups of 16 bytes, counted from the row's
// first element, so that the order of a sum does not depend on the row's place in memory.
template <class S, class Use>
__device__ __forceinline__ void for_each_of_thread(const S* z, int64_t vocab, const Use& use) {
  constexpr int kN = kLanes<S>;
  const bool aligned = misalignment(z) == 0;
  const int64_t whole = aligned ? vocab / kN * kN : 0;
  constexpr int64_t kStep = int64_t{kThreads} * kN;
  for (int64_t start = int64_t{threadIdx.x} * kN; start < vocab; start += kInFlight * kStep) {
    uint4 raw[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t first = start + i * kStep;
      if (first < whole) raw[i] = load_vector<kAligned>(z + first);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t first = start + i * kStep;
      if (first < whole) {
        S values[kN];
        unpack<S>(raw[i], values);
#pragma unroll
        for (int k = 0; k < kN; ++k) use(values[k]);
      } else {
        for (int64_t v = first; v < first + kN && v < vocab; ++v) use(z[v]);
      }
    }
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads, sizeof(S) == 8 ? 1 : 2)
    row_statistics_kernel(RowStatisticsParams p) {
  S* shared_peak = reinterpret_cast<S*>(block_scratch);
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const S* z = static_cast<const S*>(p.logits) + row * p.row_stride;
    S top;
    if (p.row_max != nullptr) {
      top = static_cast<const S*>(p.row_max)[row];
    } else {
      Peak<S> peak;
      for_each_of_thread(z, p.vocab, [&](S value) { peak.top = fmax(peak.top, value); });
      peak = block_reduce<kThreads>(peak);
      if (threadIdx.x == 0) *shared_peak = peak.top;
      __syncthreads();
      top = *shared_peak;
      __syncthreads();  // read by all before the next reduction takes the scratch
    }
    Moments<S> sums;
    for_each_of_thread(z, p.vocab, [&](S value) {
      const S distance = value - top, e = exp(distance);
      sums.total += e;
      sums.moment += e == S(0) ? S(0) : multiply(e, distance);  // 0 * -inf is 0 here
      sums.squares += multiply(e, e);
      sums.logits += value;
    });
    sums = block_reduce<kThreads>(sums);
    if (threadIdx.x != 0) continue;
    const S log_total = log(sums.total), entropy = log_total - sums.moment / sums.total;
    const int64_t target = p.targets[row];
    const bool valid = target >= 0 && target < p.vocab && entropy == entropy;
    static_cast<S*>(p.entropy)[row] = entropy;
    static_cast<S*>(p.mean_logits)[row] = sums.logits / S(p.vocab);
    static_cast<S*>(p.log_sum_sq_probs)[row] = log(sums.squares) - 2 * log_total;
    p.is_top1[row] = valid && z[target] >= top;
  }
}

template <class S>
int launch(const RowStatisticsParams& params, Stream stream) {
  return launch_kernel(row_statistics_kernel<S>, params.rows, kThreads,
                       block_reduce_bytes<kThreads, Moments<S>>(), stream, params);
}

}  // namespace

int row_statistics(const RowStatisticsParams& params, Stream stream) {
  if (params.rows == 0) return cudaSuccess;
  return params.dtype == DType::kFloat64 ? launch<double>(params, stream)
                                         : launch<float>(params, stream);
}

}  // namespace pyfast_dpo::cuda
