// Reductions over the threads of a block in a fixed order: same bits on every run, no atomics.
#pragma once

#include <cuda_runtime.h>
#include <math.h>

#include <cstdint>

namespace pyfast_dpo::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Shared scratch of a block, sized at launch: one slot a warp.
extern __shared__ __align__(16) unsigned char block_scratch[];

// A product that no compiler fuses into an addition: the copies of a loop for aligned and for other
// rows must round alike.
__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double multiply(double a, double b) { return __dmul_rn(a, b); }

// sum = sum of exp(x - top) over the entries seen, top their maximum. (-inf, 0) when nothing, or
// only -inf, was seen. fmax drops a NaN, so it is `sum` that carries NaN, through every merge.
template <class S>
struct SumExp {
  S top = -S(INFINITY);
  S sum = S(0);

  // What exponents are taken relative to: -inf - -inf would make a NaN of an empty sum.
  __device__ __forceinline__ S base() const { return top == -S(INFINITY) ? S(0) : top; }

  __device__ __forceinline__ SumExp merge(const SumExp& other) const {
    SumExp both;
    both.top = fmax(top, other.top);
    const S base = both.base();
    both.sum = multiply(sum, exp(top - base)) + multiply(other.sum, exp(other.top - base));
    return both;
  }

  __device__ __forceinline__ SumExp from_lane_above(int distance) const {
    return {__shfl_down_sync(kAllLanes, top, distance), __shfl_down_sync(kAllLanes, sum, distance)};
  }
};

// A plain sum and a count, for sequences.
struct Total {
  double sum = 0;
  long long count = 0;

  __device__ __forceinline__ Total merge(const Total& other) const {
    return {sum + other.sum, count + other.count};
  }

  __device__ __forceinline__ Total from_lane_above(int distance) const {
    return {__shfl_down_sync(kAllLanes, sum, distance),
            __shfl_down_sync(kAllLanes, count, distance)};
  }
};

template <class Partial>
__device__ __forceinline__ Partial warp_reduce(Partial partial) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    partial = partial.merge(partial.from_lane_above(distance));
  }
  return partial;
}

// Merges the partials of kThreads threads; the result is thread 0's. Every thread of the block
// calls it.
template <int kThreads, class Partial>
__device__ __forceinline__ Partial block_reduce(Partial partial) {
  constexpr int kWarps = kThreads / kWarpSize;
  static_assert(kThreads % kWarpSize == 0 && kWarps <= kWarpSize, "one warp merges all warps");
  Partial* slots = reinterpret_cast<Partial*>(block_scratch);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  partial = warp_reduce(partial);
  if (lane == 0) slots[warp] = partial;
  __syncthreads();
  if (warp == 0) partial = warp_reduce(lane < kWarps ? slots[lane] : Partial{});
  __syncthreads();  // the slots are free for the block's next row
  return partial;
}

template <int kThreads, class Partial>
constexpr size_t block_reduce_bytes() {
  return sizeof(Partial) * (kThreads / kWarpSize);
}

}  // namespace pyfast_dpo::cuda
