// The vector kernels for the avx2 instruction set.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/kernels.h"
#include "cpu/row.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace pyfast_dpo::cpu {
namespace {
namespace avx2 {
#include "cpu/simd_avx2.h"
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
}  // namespace avx2
}  // namespace

const Kernels kAvx2Kernels = {
    "avx2",
    {scalar_forward_row<double>, avx2::forward_row<float>, avx2::forward_row<BFloat16>,
     avx2::forward_row<Float16>},
    {scalar_backward_row, avx2::backward_row<float>, avx2::backward_row<BFloat16>,
     avx2::backward_row<Float16>},
    {nullptr, nullptr, avx2::backward_row<float, BFloat16>, avx2::backward_row<float, Float16>},
    {scalar_statistics_of_row, avx2::statistics_of_row},
    avx2::gemm<avx2::Singles>(),
    avx2::linear(),
    avx2::gate(),
    avx2::norm(),
    avx2::attention(),
};

}  // namespace pyfast_dpo::cpu
#pragma GCC pop_options
#endif  // __x86_64__
