// The CPU kernels: one table of function pointers per instruction set, chosen at run time.
#pragma once

#include <cstdint>

#include "common/params.h"

namespace pyfast_dpo::cpu {

// Work on one row of logits; the caller has looked its label up and owns the threading. A row's
// result depends on nothing but the row, so results do not change with the number of threads or
// with the batch.
using ForwardRow = void (*)(const SeqLogpParams&, int64_t row, int64_t target);
using BackwardRow = void (*)(const SeqLogpBackwardParams&, int64_t row, int64_t target,
                             double coefficient);

struct Kernels {
  const char* name;         // "generic", "avx2", "avx512"
  ForwardRow forward[4];    // by DType
  BackwardRow backward[4];  // by DType
};

extern const Kernels kGenericKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

// Rows of float64 logits, and rows whose values are so large that float32 arithmetic on them is not
// safe.
template <class T>
void scalar_forward_row(const SeqLogpParams& params, int64_t row, int64_t target);
void scalar_backward_row(const SeqLogpBackwardParams& params, int64_t row, int64_t target,
                         double coefficient);

// What this CPU and operating system offer: "generic", "avx2" or "avx512".
const char* best_capability();

// The table in use: the best one, or what PYFAST_DPO_CPU_CAPABILITY names when that is available.
// Read once. nullptr when the variable names something unknown or unavailable.
const Kernels* kernels();

// Whole batches over a parallel loop that the caller supplies: run(task) calls task() on every
// thread.
int64_t first_invalid_row(const RowLabels& rows);  // -1 when every label is valid

void pair_loss_forward(const PairLossParams& params);
void pair_loss_backward(const PairLossParams& params);
void unpaired_loss_forward(const UnpairedLossParams& params);
void unpaired_loss_backward(const UnpairedLossParams& params);

}  // namespace pyfast_dpo::cpu
