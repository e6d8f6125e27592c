// Scalar arithmetic that every row needs once, in double, shared by all instruction sets.
#pragma once

#include <cstdint>

#include "common/params.h"

namespace pyfast_dpo::cpu {

// static: the vector code of one instruction set must not hand its copy to the rest of the binary.
template <class T>
static inline const T* row_pointer(const void* base, const RowLabels& rows, int64_t batch_stride,
                                   int64_t row_stride, int64_t row) {
  return static_cast<const T*>(base) + (row / rows.length) * batch_stride +
         (row % rows.length) * row_stride;
}

// Writes the three numbers of a row. `total` is the sum of exp(z_v - peak) over the entries other
// than the target, `others_max` their maximum (-inf when there is none).
void write_row_stats(const SeqLogpParams& params, int64_t row, double others_max, double peak,
                     double total, double target_logit);

// Writes a row's statistics from its maximum and the sums of e = exp(z - peak), (z - peak) e, e^2,
// z.
void write_row_statistics(const RowStatisticsParams& params, int64_t row, double peak, double total,
                          double moment, double squares, double logits);

// What the backward pass needs of a row.
struct RowGradient {
  double row_max;
  // Gradient of entry v, with d = z_v - row_max: exp(d) * (scale + slope * d).
  double scale;            // -coefficient / row_sum, and a part of the entropy's gradient
  double slope;            // the other part; 0 without one
  double target_gradient;  // coefficient * (1 - p_target), without cancellation, and the entropy's
};

RowGradient read_row_gradient(const SeqLogpBackwardParams& params, int64_t row, double coefficient);

}  // namespace pyfast_dpo::cpu
