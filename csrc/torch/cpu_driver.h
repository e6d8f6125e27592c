// Whole batches of rows on the CPU, over torch's own thread pool (torch.set_num_threads rules).
#pragma once

#include "common/params.h"
#include "cpu/kernels.h"

namespace pyfast_dpo {

// The table in use. This and what follows throw std::runtime_error when PYFAST_DPO_CPU_CAPABILITY
// names no available capability.
const cpu::Kernels& cpu_kernels();

void seq_logp_forward_cpu(const SeqLogpParams& params);
void seq_logp_backward_cpu(const SeqLogpBackwardParams& params);
void row_statistics_cpu(const RowStatisticsParams& params);

}  // namespace pyfast_dpo
