// SIMD interface in plain C++, for any CPU: loops over 8 floats that the compiler vectorizes as it
// can.

struct Vec {
  static constexpr int kWidth = 8;
  float v[kWidth];
};

#define PFD_EACH(expression)                                        \
  Vec result;                                                       \
  for (int i = 0; i < Vec::kWidth; ++i) result.v[i] = (expression); \
  return result

static inline Vec set1(float x) { PFD_EACH(x); }
static inline Vec add(Vec a, Vec b) { PFD_EACH(a.v[i] + b.v[i]); }
static inline Vec sub(Vec a, Vec b) { PFD_EACH(a.v[i] - b.v[i]); }
static inline Vec mul(Vec a, Vec b) { PFD_EACH(a.v[i] * b.v[i]); }
static inline Vec div(Vec a, Vec b) { PFD_EACH(a.v[i] / b.v[i]); }
// The product is exact in double, so this rounds like a fused operation wherever it matters here.
static inline Vec fma(Vec a, Vec b, Vec c) {
  PFD_EACH(static_cast<float>(static_cast<double>(a.v[i]) * b.v[i] + c.v[i]));
}
// The second operand wins when either is NaN.
static inline Vec max(Vec a, Vec b) { PFD_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
static inline Vec min(Vec a, Vec b) { PFD_EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
static inline Vec exponent_from_low_bits(Vec a) {
  PFD_EACH(bits_to_float(float_to_bits(a.v[i]) << 23));
}

#undef PFD_EACH

static inline float reduce_add(Vec a) {
  return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
}
static inline float reduce_max(Vec a) {
  float result = a.v[0];
  for (int i = 1; i < Vec::kWidth; ++i) result = result > a.v[i] ? result : a.v[i];
  return result;
}

template <class T>
static inline void load_pair(const T* p, Vec& a, Vec& b) {
  for (int i = 0; i < Vec::kWidth; ++i) {
    a.v[i] = widen(p[i]);
    b.v[i] = widen(p[Vec::kWidth + i]);
  }
}
template <class T>
static inline void store_pair(T* p, Vec a, Vec b) {
  for (int i = 0; i < Vec::kWidth; ++i) {
    p[i] = narrow<T>(a.v[i]);
    p[Vec::kWidth + i] = narrow<T>(b.v[i]);
  }
}

static inline void stream_pair(float* p, Vec a, Vec b) { store_pair(p, a, b); }

template <int kBytes>
static inline void prefetch_bytes(const void*) {}
template <int kBytes>
static inline void prefetch_to_second_level(const void*) {}

// For the matrix products (gemm-inl.h).
static constexpr int64_t kRows = 4;

template <class T>
static inline Vec load(const T* p) {
  Vec a;
  for (int i = 0; i < Vec::kWidth; ++i) a.v[i] = widen(p[i]);
  return a;
}
template <class T>
static inline void store(T* p, Vec a) {
  for (int i = 0; i < Vec::kWidth; ++i) p[i] = narrow<T>(a.v[i]);
}

// out[j][i] = in[i][j] for kWidth x kWidth.
template <class T>
static inline void transpose(const T* in, int64_t in_stride, float* out, int64_t out_stride) {
  for (int i = 0; i < Vec::kWidth; ++i) {
    for (int j = 0; j < Vec::kWidth; ++j) out[j * out_stride + i] = widen(in[i * in_stride + j]);
  }
}
