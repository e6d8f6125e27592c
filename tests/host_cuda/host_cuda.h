// What tests set and ask of the stand-in, beside CUDA's own interface.
#pragma once

#include <cstddef>
#include <cstdint>

namespace host_cuda {

// The order in which the threads of a block run between two barriers. Correct kernels give the same
// bits in every order; a missing barrier does not.
enum class Order { kForward, kReverse, kShuffled };
void set_order(Order order, uint64_t seed);

// Makes the __syncthreads() in a line of a source file do nothing (line 0: none), so that a test
// can show that it would notice if that barrier were missing.
void skip_barrier(const char* file_suffix, int line);

// Addresses of the kernels that have been launched, each once; at most `capacity`. Returns how
// many.
size_t launched_kernels(const void** kernels, size_t capacity);

// Zeroed memory with an inaccessible page on either side. The last byte touches the upper one, less
// what aligns the first byte to `alignment`; from_start touches the lower one instead.
void* guarded_alloc(size_t bytes, size_t alignment, bool from_start);
void guarded_free(void* address);

}  // namespace host_cuda
