// The gate of a feed-forward layer, silu(gate) * up with silu(x) = x / (1 + e^-x), and its
// gradients: one pass over memory each.

// e^-x to the rounding of a float: what is left of x log2(e) beside the power of two is exact.
// Infinite above 89, zero below -88.
static inline Vec exp_of_negative(Vec x, const Vec* coefficients) {
  constexpr float kLowOfLog2E = 0x1.4ae0cp-26f;  // log2(e) - kLog2E
  const Vec t = max(set1(-88.0f), min(set1(89.0f), sub(set1(0.0f), x)));
  const Vec rounded = add(mul(t, set1(kLog2E)), set1(kRounder));
  const Vec whole = sub(rounded, set1(kRounder));
  const Vec r = fma(t, set1(kLowOfLog2E), fma(t, set1(kLog2E), sub(set1(0.0f), whole)));
  Vec value = coefficients[5];
  for (int i = 4; i >= 0; --i) value = fma(value, r, coefficients[i]);
  return mul(value, exponent_from_low_bits(rounded));
}

template <class T>
static void gate_forward(const GateParams& p, int64_t first, int64_t last) {
  const T *gate = static_cast<const T*>(p.gate), *up = static_cast<const T*>(p.up);
  T* out = static_cast<T*>(p.out);
  Vec c[6];
  load_coefficients<5>(1.0f, c);
  for (int64_t i = first; i < last; i += Vec::kWidth) {
    const Vec x = load_some(gate + i, last - i), u = load_some(up + i, last - i);
    const Vec silu = div(x, add(set1(1.0f), exp_of_negative(x, c)));
    store_some(out + i, mul(silu, u), last - i);
  }
}

// With s = 1 / (1 + e^-x): silu'(x) = s (1 + x (1 - s)).
template <class T>
static void gate_backward(const GateParams& p, int64_t first, int64_t last) {
  const T *gate = static_cast<const T*>(p.gate), *up = static_cast<const T*>(p.up);
  const T* grad_output = static_cast<const T*>(p.grad_output);
  T *grad_gate = static_cast<T*>(p.grad_gate), *grad_up = static_cast<T*>(p.grad_up);
  const Vec one = set1(1.0f);
  Vec c[6];
  load_coefficients<5>(1.0f, c);
  for (int64_t i = first; i < last; i += Vec::kWidth) {
    const Vec x = load_some(gate + i, last - i), u = load_some(up + i, last - i);
    const Vec gradient = load_some(grad_output + i, last - i);
    const Vec s = div(one, add(one, exp_of_negative(x, c)));
    const Vec slope = mul(s, fma(x, sub(one, s), one));
    store_some(grad_gate + i, mul(mul(gradient, u), slope), last - i);
    store_some(grad_up + i, mul(gradient, mul(x, s)), last - i);
  }
}

static constexpr Gate gate() {
  return {{nullptr, gate_forward<float>, gate_forward<BFloat16>, gate_forward<Float16>},
          {nullptr, gate_backward<float>, gate_backward<BFloat16>, gate_backward<Float16>}};
}
