// Stands in for the .cu files in a build without CUDA: same symbols, kNotBuilt.
#include "cuda/launch.h"

namespace pyfast_dpo::cuda {

bool is_built() { return false; }
const char* error_string(int) { return "this build has no CUDA kernels"; }
const char* built_architectures() { return ""; }
int runtime_version() { return 0; }

int64_t seq_logp_slices(DType, int64_t) { return 1; }
int seq_logp_forward(const SeqLogpParams&, Stream) { return kNotBuilt; }
int seq_logp_backward(const SeqLogpBackwardParams&, Stream) { return kNotBuilt; }
int row_statistics(const RowStatisticsParams&, Stream) { return kNotBuilt; }
int scale(const ScaleParams&, Stream) { return kNotBuilt; }
int pair_loss_forward(const PairLossParams&, Stream) { return kNotBuilt; }
int pair_loss_backward(const PairLossParams&, Stream) { return kNotBuilt; }
int unpaired_loss_forward(const UnpairedLossParams&, Stream) { return kNotBuilt; }
int unpaired_loss_backward(const UnpairedLossParams&, Stream) { return kNotBuilt; }
int policy_loss(const PolicyLossParams&, Stream) { return kNotBuilt; }
int gae(const GaeParams&, Stream) { return kNotBuilt; }

}  // namespace pyfast_dpo::cuda
