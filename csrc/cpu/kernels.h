// The CPU kernels: one table of function pointers per instruction set, chosen at run time.
#pragma once

#include <cstdint>
#include <string>

#include "common/params.h"

namespace pyfast_dpo::cpu {

// Work on one row of logits; the caller has looked its label up and owns the threading. A row's
// result depends on nothing but the row, so results do not change with the number of threads or
// with the batch.
using ForwardRow = void (*)(const SeqLogpParams&, int64_t row, int64_t target);
using BackwardRow = void (*)(const SeqLogpBackwardParams&, int64_t row, int64_t target,
                             double coefficient);

using StatisticsOfRow = void (*)(const RowStatisticsParams&, int64_t row);

// The three matrix products of the lm_head (gemm-inl.h), a task at a time, and the sizes that the
// caller needs to cut tasks and to allocate their workspace.
struct Gemm {
  int64_t rows;      // of a left panel
  int64_t columns;   // of a right panel
  int64_t panels;    // left panels in a task of gradient_of_weight
  int64_t strip;     // right panels that gradient_of_rows packs at a time
  int64_t depth[4];  // vocabulary entries that gradient_of_rows takes at a time; all by DType
  // Floats of a panel of that depth; none for float64.
  int64_t (*left_size[4])(int64_t depth);
  int64_t (*right_size[4])(int64_t depth);
  void (*pack_rows[4])(const void* in, int64_t rows, int64_t depth, float* panels);
  void (*pack_right[4])(const void* in, int64_t rows, int64_t columns, float* panels);
  void (*logits_tile[4])(const HeadParams&, int64_t tile, float* workspace);
  // The next three by gradient: [0] float32, [1] of the weight's dtype, which is bfloat16.
  // Of the rows [first, last), from the vocabulary entries [begin, end) only.
  void (*gradient_of_rows[2][4])(const HeadParams&, int64_t first, int64_t last, int64_t begin,
                                 int64_t end, float* workspace);
  // Into a float32 gradient of the weight, or one of the weight's dtype.
  void (*gradient_of_weight[2][4])(const HeadParams&, int64_t block, float* workspace);
  void (*narrow_gradient_of_weight[2][4])(const HeadParams&, int64_t block, float* workspace);
};

// Products of float32 linear layers (linear-inl.h), a task at a time. Panels as those of Gemm.
struct Linear {
  int64_t rows;       // of a left panel
  int64_t columns;    // of a right panel, and its floats for one k
  int64_t row_block;  // left panels of a task, at most
  int64_t tiles;      // right panels that it takes at a time
  // One right panel of the transpose of a matrix [columns, depth], and of one [depth, columns].
  void (*pack_transposed)(const float* in, int64_t tile, int64_t depth, int64_t columns,
                          float* out);
  void (*pack_columns)(const float* in, int64_t tile, int64_t depth, int64_t columns, float* out);
  int64_t (*workspace)(int64_t depth, int64_t low);  // floats of a task's
  void (*product)(const LinearParams&, int64_t first_panel, int64_t last_panel, int64_t first_tile,
                  int64_t last_tile, float* workspace);
};

// The gate of a feed-forward layer (gate-inl.h), elements [first, last); by DType, none for
// float64.
struct Gate {
  void (*forward[4])(const GateParams&, int64_t first, int64_t last);
  void (*backward[4])(const GateParams&, int64_t first, int64_t last);
};

// Normalization by the root mean square (norm-inl.h), float32, rows [first, last).
struct Norm {
  void (*forward)(const NormParams&, int64_t first, int64_t last);
  // Adds the rows' part of the weight's gradient to grad_weight [width] unless that is null.
  void (*backward)(const NormParams&, int64_t first, int64_t last, float* grad_weight);
};

// Attention over a row of shared prompts (attention-inl.h), a task at a time; by DType, none for
// float64.
struct Attention {
  void (*forward[4])(const AttentionParams&, int64_t block, int64_t key_head, float* workspace);
  // Blocks [first, last) are one group.
  void (*backward[4])(const AttentionParams&, int64_t first, int64_t last, int64_t key_head,
                      float* workspace);
  // Floats of a workspace, for blocks of so many keys and groups of so many tokens.
  int64_t (*forward_size)(int64_t keys, int64_t width);
  int64_t (*backward_size)(int64_t keys, int64_t tokens, int64_t width);
};

struct Kernels {
  const char* name;                // "generic", "avx2", "avx512", "avx512_bf16", "amx"
  ForwardRow forward[4];           // by DType
  BackwardRow backward[4];         // by DType
  BackwardRow narrow_backward[4];  // by DType of the gradient, a half one, of float32 logits
  StatisticsOfRow statistics[2];   // by DType: float64, float32
  Gemm gemm;
  Linear linear;
  Gate gate;
  Norm norm;
  Attention attention;
};

extern const Kernels kGenericKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512Bf16Kernels;
extern const Kernels kAmxKernels;
#endif

// Rows of float64 logits, and rows whose values are so large that float32 arithmetic on them is not
// safe.
template <class T>
void scalar_forward_row(const SeqLogpParams& params, int64_t row, int64_t target);
void scalar_backward_row(const SeqLogpBackwardParams& params, int64_t row, int64_t target,
                         double coefficient);

void scalar_statistics_of_row(const RowStatisticsParams& params, int64_t row);  // float64

// What this CPU and operating system offer: one of those names.
const char* best_capability();

// "AuthenticAMD", "GenuineIntel"; empty where the CPU has no such name.
std::string vendor();

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
void policy_loss(const PolicyLossParams& params);
void gae(const GaeParams& params);

}  // namespace pyfast_dpo::cpu
