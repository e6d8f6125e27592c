// Statistics of a row's distribution, float32 (RowStatisticsParams). Included after kernels-inl.h.

// Sums over a block: of e = exp(z - peak), of (z - peak) e, of e^2 and of z.
struct StatisticsSums {
  double total = 0, moment = 0, squares = 0, logits = 0;
};

static inline void add_statistics(const float* z, int64_t count, float peak, StatisticsSums& sums) {
  Vec c[6];
  load_coefficients<5>(1.0f, c);
  const Vec lowest = set1(kLowestDistance), offset = set1(-peak), log2e = set1(kLog2E);
  Vec total = set1(0.0f), moment = total, squares = total, logits = total;
  Vec z_pair[2], value, power;
  for (int64_t i = 0; i < count; i += kPair) {
    const int64_t present = count - i < kPair ? count - i : kPair;
    if (present == kPair) {
      load_pair(z + i, z_pair[0], z_pair[1]);
    } else {
      load_tail(z + i, present, -__builtin_inff(), z_pair[0], z_pair[1]);
    }
    for (int half = 0; half < 2; ++half) {
      const Vec distance = max(lowest, add(z_pair[half], offset));
      exp2_parts<5>(mul(distance, log2e), c, value, power);
      const Vec e = mul(value, power);
      total = add(total, e);
      moment = fma(e, distance, moment);
      squares = fma(e, e, squares);
      if (present == kPair) logits = add(logits, z_pair[half]);
    }
    if (present < kPair) {
      for (int64_t j = i; j < count; ++j) sums.logits += z[j];
    }
  }
  sums.total += reduce_add(total);
  sums.moment += reduce_add(moment);
  sums.squares += reduce_add(squares);
  sums.logits += reduce_add(logits);
}

static void statistics_of_row(const RowStatisticsParams& params, int64_t row) {
  const float* z = static_cast<const float*>(params.logits) + row * params.row_stride;
  const float peak = first_peak(z, params.vocab);
  StatisticsSums sums;
  for (int64_t begin = 0; begin < params.vocab; begin += kBlock) {
    add_statistics(z + begin, least(kBlock, params.vocab - begin), peak, sums);
  }
  write_row_statistics(params, row, peak, sums.total, sums.moment, sums.squares, sums.logits);
}
