// CUDA launchers. No torch and no CUDA header: the wrapper in csrc/torch passes raw device pointers
// and a stream, and gets an error code back (0 is success, others are cudaError_t values or
// kNotBuilt).
#pragma once

#include "common/params.h"

namespace pyfast_dpo::cuda {

constexpr int kNotBuilt = -1;

using Stream = void*;  // cudaStream_t

bool is_built();
const char* error_string(int code);  // never null
const char* built_architectures();   // such as "80;90;120", "" when not built
int runtime_version();               // CUDART_VERSION of the static runtime, 0 when not built

// Slices of a row that blocks of the forward pass work on: a function of the vocabulary alone, so
// that a row's sum has the same order, and bits, in every batch.
int64_t seq_logp_slices(DType dtype, int64_t vocab);

int seq_logp_forward(const SeqLogpParams& params, Stream stream);
int seq_logp_backward(const SeqLogpBackwardParams& params, Stream stream);
int row_statistics(const RowStatisticsParams& params, Stream stream);
int scale(const ScaleParams& params, Stream stream);
int pair_loss_forward(const PairLossParams& params, Stream stream);
int pair_loss_backward(const PairLossParams& params, Stream stream);
int unpaired_loss_forward(const UnpairedLossParams& params, Stream stream);
int unpaired_loss_backward(const UnpairedLossParams& params, Stream stream);
int policy_loss(const PolicyLossParams& params, Stream stream);
int gae(const GaeParams& params, Stream stream);

}  // namespace pyfast_dpo::cuda
