// The C interface of csrc/cuda/row_statistics.cu on the stand-in; see shim.cpp.
#include "common/params.h"
#include "cuda/launch.h"

extern "C" {

int64_t pfd_size_of_row_statistics() { return sizeof(pyfast_dpo::RowStatisticsParams); }
int pfd_row_statistics(const pyfast_dpo::RowStatisticsParams* params) {
  return pyfast_dpo::cuda::row_statistics(*params, nullptr);
}

}  // extern "C"
