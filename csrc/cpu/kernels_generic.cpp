// The vector kernels for the generic instruction set.

#include "cpu/kernels.h"
#include "cpu/row.h"

namespace pyfast_dpo::cpu {
namespace {
namespace generic {
#include "cpu/simd_generic.h"
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
}  // namespace generic
}  // namespace

const Kernels kGenericKernels = {
    "generic",
    {scalar_forward_row<double>, generic::forward_row<float>, generic::forward_row<BFloat16>,
     generic::forward_row<Float16>},
    {scalar_backward_row, generic::backward_row<float>, generic::backward_row<BFloat16>,
     generic::backward_row<Float16>},
    {nullptr, nullptr, generic::backward_row<float, BFloat16>,
     generic::backward_row<float, Float16>},
    {scalar_statistics_of_row, generic::statistics_of_row},
    generic::gemm<generic::Singles>(),
    generic::linear(),
    generic::gate(),
    generic::norm(),
    generic::attention(),
};

}  // namespace pyfast_dpo::cpu
