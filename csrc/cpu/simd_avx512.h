// SIMD interface for AVX-512 (F, BW, DQ, VL) with F16C: 16 floats. Included inside the target
// region.

struct Vec {
  static constexpr int kWidth = 16;
  __m512 v;
};

static inline Vec set1(float x) { return {_mm512_set1_ps(x)}; }
static inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// The second operand wins when either is NaN.
static inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline Vec exponent_from_low_bits(Vec a) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), 23))};
}
static inline float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }
static inline float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }

static inline void load_pair(const float* p, Vec& a, Vec& b) {
  a.v = _mm512_loadu_ps(p);
  b.v = _mm512_loadu_ps(p + 16);
}
static inline void store_pair(float* p, Vec a, Vec b) {
  _mm512_storeu_ps(p, a.v);
  _mm512_storeu_ps(p + 16, b.v);
}

// bfloat16: a takes the even elements, b the odd ones, one instruction each. No kernel cares for
// the order.
static inline void load_pair(const BFloat16* p, Vec& a, Vec& b) {
  const __m512i bits = _mm512_loadu_si512(p);
  a.v = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  b.v =
      _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
// Round to nearest, ties away from zero: half an ulp like ties to even, in one instruction instead
// of four. NaNs here come from bfloat16 inputs or are the default NaN, so their low 16 bits are 0
// and the addition cannot carry them out of the exponent.
static inline __m512i rounded_to_upper_half(Vec a) {
  return _mm512_add_epi32(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x8000));
}
static inline void store_pair(BFloat16* p, Vec a, Vec b) {
  const __m512i even = _mm512_srli_epi32(rounded_to_upper_half(a), 16);
  _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaau, even, rounded_to_upper_half(b)));
}

static inline void load_pair(const Float16* p, Vec& a, Vec& b) {
  a.v = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  b.v = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16)));
}
static inline void store_pair(Float16* p, Vec a, Vec b) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16),
                      _mm512_cvtps_ph(b.v, _MM_FROUND_TO_NEAREST_INT));
}

template <int kBytes>
static inline void prefetch_bytes(const void* p) {
  for (int i = 0; i < kBytes; i += 64) _mm_prefetch(static_cast<const char*>(p) + i, _MM_HINT_T0);
}
