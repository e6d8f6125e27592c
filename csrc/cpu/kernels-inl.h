// The vector kernels, written once against the small SIMD interface of simd_*.h and compiled for
// each instruction set: kernels_*.cpp include this file inside a namespace and a target region of
// their own. No lambdas and no std templates in here: their code could be merged with, or escape
// into, the rest of the binary and run on a CPU that lacks the instructions.
//
// exp(x) is 2^y with y = x log2(e) - reference, one fused multiply-add from the logit. The
// reference is a float near max * log2(e); its own rounding cancels, because the very float enters
// the final sum.

// Relative minimax polynomials for 2^r on [-1/2, 1/2] (Remez): worst errors 1.5e-7 (degree 5, with
// the constant fixed to 1), 2.6e-6 (4), 7.5e-5 (3).
template <int kDegree>
struct Exp2Coefficients;
template <>
struct Exp2Coefficients<5> {
  static constexpr float kValues[] = {1.0f,           0x1.62e428p-1f, 0x1.ebf918p-3f,
                                      0x1.c6b6e4p-5f, 0x1.3d0c52p-7f, 0x1.5c08e6p-10f};
};
template <>
struct Exp2Coefficients<4> {
  static constexpr float kValues[] = {0x1.ffffe8p-1f, 0x1.62e0dcp-1f, 0x1.ec06dap-3f,
                                      0x1.ca1440p-5f, 0x1.3997d6p-7f};
};
template <>
struct Exp2Coefficients<3> {
  static constexpr float kValues[] = {0x1.fff692p-1f, 0x1.62f31ap-1f, 0x1.f0de1ap-3f,
                                      0x1.c3f762p-5f};
};

// Degree of the backward pass: the error of exp stays far below the rounding of the stored gradient
// (half an ulp is 2^-9 for bfloat16, 2^-12 for float16).
template <class T>
struct BackwardDegree {
  static constexpr int kValue = 5;
};
template <>
struct BackwardDegree<BFloat16> {
  static constexpr int kValue = 3;
};
template <>
struct BackwardDegree<Float16> {
  static constexpr int kValue = 4;
};

static constexpr float kLog2E = 0x1.715476p+0f;
// Adding 1.5 * 2^23 rounds to an integer; the 127 beside it is the exponent bias, so that the low
// bits of the sum, moved to the exponent's place, are 2^n. n is at least -127, whose biased
// exponent is 0: exactly 0.
static constexpr float kRounder = 12582912.0f + 127.0f;
static constexpr float kLowestExponent = -127.0f;
// The reference is rounded to a float, so that the peak lies up to half its ulp away from 2^0: 8
// powers of two at 1e8, still far from both ends of the exponent. Rows beyond go to the scalar
// code.
static constexpr float kLargestPeak = 1e8f;
// How far, in powers of two, entries may rise above the reference of their block's sum.
static constexpr float kHeadroom = 32.0f;
static constexpr int64_t kBlock = 2048;            // elements
static constexpr int64_t kPair = 2 * Vec::kWidth;  // load_pair and store_pair move two vectors
static constexpr int64_t kAhead = 1024;            // elements to prefetch ahead

// 2^y split into a polynomial value and a power of two, both to be multiplied. NaN stays NaN.
template <int kDegree>
static inline void exp2_parts(Vec y, const Vec* coefficients, Vec& value, Vec& power) {
  y = max(set1(kLowestExponent), y);
  const Vec rounded = add(y, set1(kRounder));
  const Vec r = sub(y, sub(rounded, set1(kRounder)));
  value = coefficients[kDegree];
  for (int i = kDegree - 1; i >= 0; --i) value = fma(value, r, coefficients[i]);
  power = exponent_from_low_bits(rounded);
}

template <int kDegree>
static inline void load_coefficients(float scale, Vec* coefficients) {
  for (int i = 0; i <= kDegree; ++i) {
    coefficients[i] = set1(scale * Exp2Coefficients<kDegree>::kValues[i]);
  }
}

// The last elements of a span, widened, with `filler` behind them.
template <class T>
static inline void load_tail(const T* z, int64_t count, float filler, Vec& a, Vec& b) {
  T buffer[kPair];
  for (int64_t i = 0; i < kPair; ++i) buffer[i] = i < count ? z[i] : narrow<T>(filler);
  load_pair(buffer, a, b);
}

struct BlockSum {
  float sum;   // of 2^(z log2(e) - reference); meaningless when the peak is far above the reference
  float peak;  // maximum; may miss NaN, which the sum never does
};

template <class T>
static inline BlockSum sum_block(const T* z, int64_t count, float reference) {
  Vec c[6];
  load_coefficients<5>(1.0f, c);
  const Vec log2e = set1(kLog2E), offset = set1(-reference);
  Vec sum_a = set1(0.0f), sum_b = sum_a, peak_a = set1(-__builtin_inff()), peak_b = peak_a;
  Vec a, b, value, power;
  for (int64_t i = 0; i < count; i += kPair) {
    if (count - i >= kPair) {
      prefetch_bytes<kPair * sizeof(T)>(z + i + kAhead);
      load_pair(z + i, a, b);
    } else {
      load_tail(z + i, count - i, -__builtin_inff(), a, b);
    }
    peak_a = max(peak_a, a);
    exp2_parts<5>(fma(a, log2e, offset), c, value, power);
    sum_a = fma(value, power, sum_a);
    peak_b = max(peak_b, b);
    exp2_parts<5>(fma(b, log2e, offset), c, value, power);
    sum_b = fma(value, power, sum_b);
  }
  return {reduce_add(add(sum_a, sum_b)), reduce_max(max(peak_a, peak_b))};
}

template <class T>
static inline float first_peak(const T* z, int64_t count) {
  Vec peak = set1(-__builtin_inff()), a, b;
  for (int64_t i = 0; i < count; i += kPair) {
    if (count - i >= kPair) {
      load_pair(z + i, a, b);
    } else {
      load_tail(z + i, count - i, -__builtin_inff(), a, b);
    }
    peak = max(max(peak, a), b);
  }
  return reduce_max(peak);
}

template <class T>
static inline bool has_nan(const T* z, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (widen(z[i]) != widen(z[i])) return true;
  }
  return false;
}

// Running log-sum-exp of the entries seen so far: sum of 2^(z log2(e) - reference).
struct Running {
  float peak;       // maximum so far, -inf at first
  float reference;  // near a maximum seen so far, times log2(e)
  double total;
  bool in_range;  // false: leave this row to the scalar code
};

static inline void move_reference(float peak, Running& running) {
  const float reference = peak * kLog2E;
  if (running.total != 0) {
    running.total *= __builtin_exp2(static_cast<double>(running.reference) - reference);
  }
  running.reference = reference;
  running.in_range = peak < kLargestPeak && peak > -kLargestPeak;
}

// One pass: each block is summed against the reference of the blocks before it, and again only when
// it rises far above, which happens a few times in a row of logits at most.
template <class T>
static inline void add_span(const T* z, int64_t count, Running& running) {
  for (int64_t begin = 0; begin < count && running.in_range; begin += kBlock) {
    const int64_t size = count - begin < kBlock ? count - begin : kBlock;
    if (running.peak == -__builtin_inff()) {
      running.peak = first_peak(z + begin, size);
      if (running.peak == -__builtin_inff()) {  // nothing possible here, unless a NaN hid
        if (has_nan(z + begin, size)) running.total = __builtin_nan("");
        continue;
      }
      move_reference(running.peak, running);
    }
    BlockSum block = sum_block(z + begin, size, running.reference);
    if (block.peak * kLog2E - running.reference > kHeadroom) {
      move_reference(block.peak, running);
      block = sum_block(z + begin, size, running.reference);
    }
    running.peak = block.peak > running.peak ? block.peak : running.peak;
    running.total += block.sum;
  }
}

template <class T>
static void forward_row(const SeqLogpParams& params, int64_t row, int64_t target) {
  const T* z =
      row_pointer<T>(params.logits, params.rows, params.batch_stride, params.row_stride, row);
  Running running{-__builtin_inff(), 0.0f, 0.0, true};
  add_span(z, target, running);
  if (running.in_range) add_span(z + target + 1, params.rows.vocab - target - 1, running);
  const float target_logit = widen(z[target]);
  if (!running.in_range || !(target_logit < kLargestPeak)) {
    scalar_forward_row<T>(params, row, target);
    return;
  }
  write_row_stats(params, row, running.peak,
                  static_cast<double>(running.reference) / static_cast<double>(kLog2E),
                  running.total, target_logit);
}

// Stores a pair that load_pair took of T, in the order that it has then.
template <class T, class Out>
static inline void store_like_loaded(Out* p, Vec a, Vec b) {
  if constexpr (__is_same(T, Out)) {
    store_pair(p, a, b);
  } else {  // a float pair has the order of memory
    store(p, a);
    store(p + Vec::kWidth, b);
  }
}

// Of the entries of a row: 2^(z log2(e) - reference) * (scale + slope * (z - peak)).
struct EntryGradient {
  float reference, peak, scale, slope;
};

// Below this distance to the peak exp is exactly 0 here, and 0 times a finite number is not NaN as
// 0 * -inf would be.
static constexpr float kLowestDistance = -104.0f;

template <int kDegree, bool kSloping>
static inline Vec gradient_of(Vec z, const Vec* coefficients, const EntryGradient& g) {
  Vec value, power;
  exp2_parts<kDegree>(fma(z, set1(kLog2E), set1(-g.reference)), coefficients, value, power);
  const Vec e = mul(value, power);
  if constexpr (kSloping) {
    const Vec distance = max(set1(kLowestDistance), sub(z, set1(g.peak)));
    return mul(e, fma(distance, set1(g.slope), set1(g.scale)));
  }
  return e;
}

// Without a slope the scale is folded into the polynomial.
template <bool kSloping, class T, class Out>
static inline void gradient_span(const T* z, Out* grad, int64_t count, const EntryGradient& g) {
  constexpr int kDegree = BackwardDegree<T>::kValue;
  Vec c[kDegree + 1];
  load_coefficients<kDegree>(kSloping ? 1.0f : g.scale, c);
  Vec a, b;
  int64_t i = 0;
  for (; i + kPair <= count; i += kPair) {
    prefetch_bytes<kPair * sizeof(T)>(z + i + kAhead);
    load_pair(z + i, a, b);
    a = gradient_of<kDegree, kSloping>(a, c, g);
    b = gradient_of<kDegree, kSloping>(b, c, g);
    store_like_loaded<T>(grad + i, a, b);
  }
  if (i < count) {
    load_tail(z + i, count - i, 0.0f, a, b);
    a = gradient_of<kDegree, kSloping>(a, c, g);
    b = gradient_of<kDegree, kSloping>(b, c, g);
    Out buffer[kPair];
    store_like_loaded<T>(buffer, a, b);
    for (int64_t j = 0; i + j < count; ++j) grad[i + j] = buffer[j];
  }
}

template <bool kSloping, class T, class Out>
static inline void gradient_around(const T* z, Out* grad, int64_t target, int64_t vocab,
                                   const EntryGradient& g) {
  gradient_span<kSloping>(z, grad, target, g);
  gradient_span<kSloping>(z + target + 1, grad + target + 1, vocab - target - 1, g);
}

template <class T, class Out = T>
static void backward_row(const SeqLogpBackwardParams& params, int64_t row, int64_t target,
                         double coefficient) {
  const RowGradient gradient = read_row_gradient(params, row, coefficient);
  const float reference = static_cast<float>(gradient.row_max) * kLog2E;
  const double rounding = __builtin_exp(
      static_cast<double>(reference) / static_cast<double>(kLog2E) - gradient.row_max);
  const double scale = gradient.scale * rounding, slope = gradient.slope * rounding;
  const bool in_range = gradient.row_max < kLargestPeak && gradient.row_max > -kLargestPeak &&
                        scale > -1e30 && scale < 1e30 && slope > -1e30 && slope < 1e30;
  if (!in_range) {  // NaN and infinities included: plain arithmetic decides there
    scalar_backward_row(params, row, target, coefficient);
    return;
  }
  const T* z =
      row_pointer<T>(params.logits, params.rows, params.batch_stride, params.row_stride, row);
  Out* grad = const_cast<Out*>(row_pointer<Out>(
      params.grad_logits, params.rows, params.grad_batch_stride, params.grad_row_stride, row));
  const EntryGradient g{reference, static_cast<float>(gradient.row_max), static_cast<float>(scale),
                        static_cast<float>(slope)};
  if (slope == 0) {
    gradient_around<false>(z, grad, target, params.rows.vocab, g);
  } else {
    gradient_around<true>(z, grad, target, params.rows.vocab, g);
  }
  grad[target] = narrow<Out>(gradient.target_gradient);
}
