// The vector kernels for the avx512 instruction set.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/kernels.h"
#include "cpu/row.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

namespace pyfast_dpo::cpu {
namespace {
namespace avx512 {
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
}  // namespace avx512
}  // namespace

const Kernels kAvx512Kernels = {
    "avx512",
    {scalar_forward_row<double>, avx512::forward_row<float>, avx512::forward_row<BFloat16>,
     avx512::forward_row<Float16>},
    {scalar_backward_row, avx512::backward_row<float>, avx512::backward_row<BFloat16>,
     avx512::backward_row<Float16>},
    {nullptr, nullptr, avx512::backward_row<float, BFloat16>, avx512::backward_row<float, Float16>},
    {scalar_statistics_of_row, avx512::statistics_of_row},
    avx512::gemm<avx512::Singles>(),
    avx512::linear(),
    avx512::gate(),
    avx512::norm(),
    avx512::attention(),
};

}  // namespace pyfast_dpo::cpu
#pragma GCC pop_options
#endif  // __x86_64__
