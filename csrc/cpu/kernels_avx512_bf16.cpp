// The vector kernels for AVX-512 with its BF16 extension: the products of bfloat16 matrices differ.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/kernels.h"
#include "cpu/row.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")

namespace pyfast_dpo::cpu {
namespace {
namespace avx512_bf16 {
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
#include "cpu/gemm_bf16-inl.h"
}  // namespace avx512_bf16
}  // namespace

const Kernels kAvx512Bf16Kernels = {
    "avx512_bf16",
    {scalar_forward_row<double>, avx512_bf16::forward_row<float>,
     avx512_bf16::forward_row<BFloat16>, avx512_bf16::forward_row<Float16>},
    {scalar_backward_row, avx512_bf16::backward_row<float>, avx512_bf16::backward_row<BFloat16>,
     avx512_bf16::backward_row<Float16>},
    {nullptr, nullptr, avx512_bf16::backward_row<float, BFloat16>,
     avx512_bf16::backward_row<float, Float16>},
    {scalar_statistics_of_row, avx512_bf16::statistics_of_row},
    avx512_bf16::gemm<avx512_bf16::Pairs>(),
    avx512_bf16::linear(),
    avx512_bf16::gate(),
    avx512_bf16::norm(),
    avx512_bf16::attention(),
};

}  // namespace pyfast_dpo::cpu
#pragma GCC pop_options
#endif  // __x86_64__
