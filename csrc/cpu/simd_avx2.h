// SIMD interface for AVX2 with FMA and F16C: 8 floats. Included inside the target region.

struct Vec {
  static constexpr int kWidth = 8;
  __m256 v;
};

static inline Vec set1(float x) { return {_mm256_set1_ps(x)}; }
static inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
static inline Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
static inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
static inline Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
static inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
// The second operand wins when either is NaN.
static inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
static inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
static inline Vec exponent_from_low_bits(Vec a) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.v), 23))};
}
static inline float reduce_add(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static inline float reduce_max(Vec a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

static inline void load_pair(const float* p, Vec& a, Vec& b) {
  a.v = _mm256_loadu_ps(p);
  b.v = _mm256_loadu_ps(p + 8);
}
static inline void store_pair(float* p, Vec a, Vec b) {
  _mm256_storeu_ps(p, a.v);
  _mm256_storeu_ps(p + 8, b.v);
}
// To whole cache lines, without reading them first.
static inline void stream_pair(float* p, Vec a, Vec b) {
  _mm256_stream_ps(p, a.v);
  _mm256_stream_ps(p + 8, b.v);
}

// bfloat16: a takes the even elements, b the odd ones, one instruction each. No kernel cares for
// the order.
static inline void load_pair(const BFloat16* p, Vec& a, Vec& b) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  a.v = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
  b.v =
      _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
// Round to nearest, ties away from zero: half an ulp like ties to even, in one instruction instead
// of four. NaNs here come from bfloat16 inputs or are the default NaN, so their low 16 bits are 0
// and the addition cannot carry them out of the exponent. (Rows with other NaNs are scalar work.)
static inline __m256i rounded_to_upper_half(Vec a) {
  return _mm256_add_epi32(_mm256_castps_si256(a.v), _mm256_set1_epi32(0x8000));
}
static inline void store_pair(BFloat16* p, Vec a, Vec b) {
  const __m256i even = _mm256_srli_epi32(rounded_to_upper_half(a), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm256_blend_epi16(even, rounded_to_upper_half(b), 0xaa));
}

static inline void load_pair(const Float16* p, Vec& a, Vec& b) {
  a.v = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  b.v = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)));
}
static inline void store_pair(Float16* p, Vec a, Vec b) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8),
                   _mm256_cvtps_ph(b.v, _MM_FROUND_TO_NEAREST_INT));
}

template <int kBytes>
static inline void prefetch_bytes(const void* p) {
  for (int i = 0; i < kBytes; i += 64) _mm_prefetch(static_cast<const char*>(p) + i, _MM_HINT_T0);
}
template <int kBytes>
static inline void prefetch_to_second_level(const void* p) {
  for (int i = 0; i < kBytes; i += 64) _mm_prefetch(static_cast<const char*>(p) + i, _MM_HINT_T1);
}

// For the matrix products (gemm-inl.h): 6 x 16 sums take 12 of the 16 registers.
static constexpr int64_t kRows = 6;

// One vector in memory order.
static inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
static inline Vec load(const BFloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
static inline Vec load(const Float16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
static inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
// Ties to even.
static inline void store(BFloat16* p, Vec a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i upper = _mm256_srli_epi32(rounded, 16);
  const __m256i packed = _mm256_packus_epi32(upper, upper);  // halves: 0-3 0-3 | 4-7 4-7
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}
static inline void store(Float16* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

// out[j][i] = in[i][j] for 8 x 8: pairs, then quads, then halves change places.
template <class T>
static inline void transpose(const T* in, int64_t in_stride, float* out, int64_t out_stride) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = load(in + i * in_stride).v;
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m256d low = _mm256_castps_pd(b[i + j]), high = _mm256_castps_pd(b[i + j + 2]);
      a[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, high));
      a[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, high));
    }
  }
  for (int c = 0; c < 4; ++c) {
    _mm256_storeu_ps(out + c * out_stride, _mm256_permute2f128_ps(a[c], a[4 + c], 0x20));
    _mm256_storeu_ps(out + (4 + c) * out_stride, _mm256_permute2f128_ps(a[c], a[4 + c], 0x31));
  }
}
