// The vector kernels of AVX-512, with AMX for the matrix products.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/kernels.h"
#include "cpu/row.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16")

namespace pyfast_dpo::cpu {
namespace {
namespace amx_table {
#include "cpu/simd_avx512.h"
//
#include "cpu/kernels-inl.h"
//
#include "cpu/rows-inl.h"
//
#include "cpu/gemm-inl.h"
//
#include "cpu/linear-inl.h"
//
#include "cpu/attention-inl.h"
//
#include "cpu/gate-inl.h"
//
#include "cpu/norm-inl.h"
//
#include "cpu/statistics-inl.h"
//
#include "cpu/amx_panels-inl.h"
//
#include "cpu/gemm_amx-inl.h"
}  // namespace amx_table
}  // namespace

const Kernels kAmxKernels = {
    "amx",
    {scalar_forward_row<double>, amx_table::forward_row<float>, amx_table::forward_row<BFloat16>,
     amx_table::forward_row<Float16>},
    {scalar_backward_row, amx_table::backward_row<float>, amx_table::backward_row<BFloat16>,
     amx_table::backward_row<Float16>},
    {nullptr, nullptr, amx_table::backward_row<float, BFloat16>,
     amx_table::backward_row<float, Float16>},
    {scalar_statistics_of_row, amx_table::statistics_of_row},
    amx_table::amx::gemm(),
    amx_table::linear(),
    amx_table::gate(),
    amx_table::norm(),
    amx_table::attention(),
};

}  // namespace pyfast_dpo::cpu
#pragma GCC pop_options
#endif  // __x86_64__
