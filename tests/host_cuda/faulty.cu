// Kernels with one mistake each: the stand-in's own tests show that it catches them.
#include <cuda_runtime.h>

namespace pyfast_dpo::cuda {
extern __shared__ __align__(16) unsigned char block_scratch[];

namespace {

constexpr int kThreads = 64;

enum Fault : int {
  kNone,
  kMissingBarrier,     // reads a neighbour's shared value before a barrier made it visible
  kDivergentBarrier,   // half of the block does not come to the barrier
  kDifferentBarriers,  // the halves of the block wait at two barriers
  kPartialShuffle,     // one lane stays away from a shuffle
  kReadPastEnd,
  kWritePastEnd,
  kWriteBeforeStart,
  kMisalignedVector,
  kSharedPastEnd,
};

// out[i] = in[kThreads - 1 - i], through shared memory.
__global__ void reverse_kernel(const float* in, float* out, int fault) {
  float* shared = reinterpret_cast<float*>(block_scratch);
  const int i = threadIdx.x;
  shared[i] = in[i + (fault == kReadPastEnd)];
  if (fault == kSharedPastEnd) shared[i + 1] = 0;
  if (fault == kDivergentBarrier) {
    if (i < kThreads / 2) __syncthreads();
  } else if (fault == kDifferentBarriers) {
    if (i < kThreads / 2) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else if (fault != kMissingBarrier) {
    __syncthreads();
  }
  float value = shared[kThreads - 1 - i];
  if (fault != kPartialShuffle || i != 3) value = __shfl_down_sync(0xffffffffu, value, 0);
  if (fault == kMisalignedVector && i == 0) {
    __stcs(reinterpret_cast<uint4*>(out + 1), make_uint4(0, 0, 0, 0));
  }
  out[i + (fault == kWritePastEnd) - (fault == kWriteBeforeStart)] = value;
}

}  // namespace
}  // namespace pyfast_dpo::cuda

extern "C" int pfd_faulty(const float* in, float* out, int fault) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(2);
  config.blockDim = dim3(pyfast_dpo::cuda::kThreads);
  config.dynamicSmemBytes = sizeof(float) * pyfast_dpo::cuda::kThreads;
  return cudaLaunchKernelEx(&config, pyfast_dpo::cuda::reverse_kernel, in, out, fault);
}
