// The few macros that a plain C++ compiler, nvcc and the host stand-in all understand.
#pragma once

#if defined(__CUDACC__)
#define PFD_HD __host__ __device__
#else
#define PFD_HD
#endif

// For what kernels of every instruction set call: one set's copy must not become everybody's.
#define PFD_ALWAYS_INLINE inline __attribute__((always_inline))
