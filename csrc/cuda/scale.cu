// values *= factor, in float32 for halves, rounded once. The factor is read on the device, so
// nothing waits for it; where it is 1, as at the head of most backward passes, memory is not
// touched.
#include <cuda_runtime.h>

#include <cstdint>

#include "common/params.h"
#include "cuda/launch.h"
#include "cuda/launch_kernel.cuh"
#include "cuda/vec.cuh"

namespace pyfast_dpo::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 4;  // vectors that a thread loads before it writes the first
constexpr int64_t kBlocks = 1024;

template <class T>
__global__ void __launch_bounds__(kThreads) scale_kernel(ScaleParams p) {
  using S = StatT<T>;
  constexpr int kN = kLanes<T>;
  const S factor = *static_cast<const S*>(p.factor);
  if (factor == S(1)) return;
  T* values = static_cast<T*>(p.values);
  const int64_t whole = misalignment(values) == 0 ? p.count / kN : 0;  // vectors
  const int64_t step = int64_t{gridDim.x} * kThreads;
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  for (int64_t start = thread; start < whole; start += kInFlight * step) {
    uint4 raw[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t vector = start + i * step;
      if (vector < whole) raw[i] = load_vector<kAligned>(values + vector * kN);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t vector = start + i * step;
      if (vector >= whole) continue;
      S lanes[kN];
      unpack<T>(raw[i], lanes);
#pragma unroll
      for (int k = 0; k < kN; ++k) lanes[k] *= factor;
      __stcs(reinterpret_cast<uint4*>(values + vector * kN), pack<T>(lanes));
    }
  }
  for (int64_t i = whole * kN + thread; i < p.count; i += step) {
    values[i] = Element<T>::narrow(Element<T>::widen(values[i]) * factor);
  }
}

}  // namespace

int scale(const ScaleParams& params, Stream stream) {
  if (params.count == 0) return cudaSuccess;
  return dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t full = int64_t{kThreads} * kInFlight * kLanes<T>;
    const int64_t wanted = (params.count + full - 1) / full;
    return launch_kernel(scale_kernel<T>, wanted < kBlocks ? wanted : kBlocks, kThreads, 0, stream,
                         params);
  });
}

}  // namespace pyfast_dpo::cuda
