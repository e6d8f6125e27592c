// Host stand-in for <cuda_runtime.h>: enough of CUDA C++ for g++ to compile the kernels of
// csrc/cuda and run them on the CPU. Threads of a block are fibers that switch at barriers and
// shuffles only; blocks run one after another. See host_cuda.cpp for what it checks.
#pragma once

#include <math.h>  // the C++ wrapper: exp(float), log1p(float), ... in the global namespace, as in CUDA

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define CUDART_VERSION 0
#define __CUDA_ARCH_LIST__ 0

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// Only `extern __shared__` is supported: the array is host_cuda.cpp's, where it is poisoned and
// checked.
#define __shared__

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// Those of the fiber that runs; the scheduler sets them before it switches.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchFailure = 719,
};
using cudaStream_t = void*;

namespace host_cuda {

// The message of the last launch that failed.
const char* last_message();

// Runs every thread of every block. kernel() is one thread.
cudaError_t launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

// Notes that this kernel has run.
void record_launch(const void* kernel);

void barrier(const char* file, int line);

// What the lanes of a warp do together: each gives a value and gets that of lane `source`.
enum class Collective { kNone, kShuffle, kShuffleDown, kShuffleXor, kBallot };
uint64_t exchange(Collective kind, unsigned mask, uint64_t value, int source);
unsigned ballot(unsigned mask, bool vote);
int lane();

template <class T>
T shuffle(Collective kind, unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(value));
  bits = exchange(kind, mask, bits, source);
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// ex2.approx.ftz: flushes to zero, and is as inexact as the hardware may be, 2 ulp off on either
// side.
inline float exp2_approx(float x) {
  const float exact = exp2f(x);
  if (exact < 0x1p-126f) return 0.0f;
  if (!(exact < INFINITY) || x == 0.0f) return exact;
  uint32_t input, bits;
  std::memcpy(&input, &x, sizeof(x));
  std::memcpy(&bits, &exact, sizeof(exact));
  bits += input & 1 ? 2 : -2;
  float off;
  std::memcpy(&off, &bits, sizeof(bits));
  return off;
}

}  // namespace host_cuda

#define __syncthreads() host_cuda::barrier(__FILE__, __LINE__)

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return host_cuda::shuffle(host_cuda::Collective::kShuffle, mask, value, source & 31);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int distance) {
  const int source = host_cuda::lane() + distance;  // past the last lane: the lane's own value
  return host_cuda::shuffle(host_cuda::Collective::kShuffleDown, mask, value,
                            source < 32 ? source : host_cuda::lane());
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return host_cuda::shuffle(host_cuda::Collective::kShuffleXor, mask, value,
                            host_cuda::lane() ^ bits);
}
inline unsigned __ballot_sync(unsigned mask, bool vote) { return host_cuda::ballot(mask, vote); }
inline bool __any_sync(unsigned mask, bool vote) { return host_cuda::ballot(mask, vote) != 0; }
inline bool __all_sync(unsigned mask, bool vote) { return host_cuda::ballot(mask, vote) == mask; }

// An unaligned vector access is a fault on the device; x86 would forgive it.
template <class T>
T __ldcs(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % alignof(T)) __builtin_trap();
  return *address;
}
template <class T>
void __stcs(T* address, T value) {
  if (reinterpret_cast<uintptr_t>(address) % alignof(T)) __builtin_trap();
  *address = value;
}

inline int min(int a, int b) { return a < b ? a : b; }

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned bits) {
  return static_cast<unsigned>(((uint64_t{high} << 32) | low) >> (bits & 31));
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

template <class... Formal, class... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Formal...),
                               Actual... arguments) {
  host_cuda::record_launch(reinterpret_cast<const void*>(kernel));
  return host_cuda::launch(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                           [=] { kernel(arguments...); });
}

inline const char* cudaGetErrorString(cudaError_t) { return host_cuda::last_message(); }
