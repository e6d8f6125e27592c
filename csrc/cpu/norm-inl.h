// Normalization by the root mean square (NormParams) and its gradients, one pass over memory each:
// a row stays in the first-level cache. Included after rows-inl.h.

static void norm_forward(const NormParams& p, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const float* in = p.in + row * p.width;
    float* out = p.out + row * p.width;
    const float mean = dot(in, in, p.width) / static_cast<float>(p.width);
    p.inverse[row] = 1.0f / __builtin_sqrtf(mean + p.epsilon);
    const Vec inverse = set1(p.inverse[row]);
    for (int64_t i = 0; i < p.width; i += Vec::kWidth) {
      const int64_t count = p.width - i;
      const Vec normalized = mul(load_some(in + i, count), inverse);
      store_some(out + i, mul(normalized, load_some(p.weight + i, count)), count);
    }
  }
}

// With g = grad_output * weight: grad_in = inverse (g - in * inverse^2 * mean(g * in)).
static void norm_backward(const NormParams& p, int64_t first, int64_t last, float* grad_weight) {
  for (int64_t row = first; row < last; ++row) {
    const float *in = p.in + row * p.width, *grad_output = p.grad_output + row * p.width;
    float* grad_in = p.grad_in + row * p.width;
    const Vec inverse = set1(p.inverse[row]);
    Vec sums = set1(0.0f);
    for (int64_t i = 0; i < p.width; i += Vec::kWidth) {
      const int64_t count = p.width - i;
      const Vec product = mul(load_some(grad_output + i, count), load_some(in + i, count));
      sums = fma(product, load_some(p.weight + i, count), sums);
      if (grad_weight != nullptr) {
        store_some(grad_weight + i, fma(product, inverse, load_some(grad_weight + i, count)),
                   count);
      }
    }
    const float mean = reduce_add(sums) / static_cast<float>(p.width);
    const Vec factor = set1(-mean * p.inverse[row] * p.inverse[row]);
    for (int64_t i = 0; i < p.width; i += Vec::kWidth) {
      const int64_t count = p.width - i;
      const Vec g = mul(load_some(grad_output + i, count), load_some(p.weight + i, count));
      store_some(grad_in + i, mul(inverse, fma(load_some(in + i, count), factor, g)), count);
    }
  }
}

static constexpr Norm norm() { return {norm_forward, norm_backward}; }
