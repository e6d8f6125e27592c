// The C interface through which the Python tests call the launchers on the stand-in.
// Arguments are the structs of common/params.h, mirrored in Python by ctypes; pfd_sizes lets the
// test notice when the mirror is out of date.
#include "common/losses.h"
#include "common/params.h"
#include "cuda/launch.h"
#include "host_cuda.h"

using namespace pyfast_dpo;

extern "C" {

void pfd_sizes(int64_t* sizes) {
  sizes[0] = sizeof(SeqLogpParams);
  sizes[1] = sizeof(SeqLogpBackwardParams);
  sizes[2] = sizeof(PairLossParams);
  sizes[3] = sizeof(UnpairedLossParams);
  sizes[4] = sizeof(RowStatisticsParams);
  sizes[5] = sizeof(PolicyLossParams);
  sizes[6] = sizeof(GaeParams);
  sizes[7] = sizeof(ScaleParams);
}

int pfd_pair_loss_index(const char* name) { return PairLosses::index_of(name); }
int pfd_unpaired_loss_index(const char* name) { return UnpairedLosses::index_of(name); }
int pfd_policy_loss_index(const char* name) { return PolicyLosses::index_of(name); }

int pfd_seq_logp_slices(int dtype, int64_t vocab) {
  return static_cast<int>(cuda::seq_logp_slices(static_cast<DType>(dtype), vocab));
}
int pfd_seq_logp_forward(const SeqLogpParams* params) {
  return cuda::seq_logp_forward(*params, nullptr);
}
int pfd_seq_logp_backward(const SeqLogpBackwardParams* params) {
  return cuda::seq_logp_backward(*params, nullptr);
}
int pfd_pair_loss_forward(const PairLossParams* params) {
  return cuda::pair_loss_forward(*params, nullptr);
}
int pfd_pair_loss_backward(const PairLossParams* params) {
  return cuda::pair_loss_backward(*params, nullptr);
}
int pfd_unpaired_loss_forward(const UnpairedLossParams* params) {
  return cuda::unpaired_loss_forward(*params, nullptr);
}
int pfd_unpaired_loss_backward(const UnpairedLossParams* params) {
  return cuda::unpaired_loss_backward(*params, nullptr);
}
int pfd_policy_loss(const PolicyLossParams* params) { return cuda::policy_loss(*params, nullptr); }
int pfd_gae(const GaeParams* params) { return cuda::gae(*params, nullptr); }
int pfd_row_statistics(const RowStatisticsParams* params) {
  return cuda::row_statistics(*params, nullptr);
}
int pfd_scale(const ScaleParams* params) { return cuda::scale(*params, nullptr); }
const char* pfd_error_string(int code) { return cuda::error_string(code); }

void pfd_set_order(int order, uint64_t seed) {
  host_cuda::set_order(static_cast<host_cuda::Order>(order), seed);
}
void pfd_skip_barrier(const char* file_suffix, int line) {
  host_cuda::skip_barrier(file_suffix, line);
}
size_t pfd_launched_kernels(const void** kernels, size_t capacity) {
  return host_cuda::launched_kernels(kernels, capacity);
}
void* pfd_guarded_alloc(size_t bytes, size_t alignment, bool from_start) {
  return host_cuda::guarded_alloc(bytes, alignment, from_start);
}
void pfd_guarded_free(void* address) { host_cuda::guarded_free(address); }

}  // extern "C"
