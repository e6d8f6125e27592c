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
static inline Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// The second operand wins when either is NaN.
static inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
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
// To whole cache lines, without reading them first.
static inline void stream_pair(float* p, Vec a, Vec b) {
  _mm512_stream_ps(p, a.v);
  _mm512_stream_ps(p + 16, b.v);
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
// and the addition cannot carry them out of the exponent. (Rows with other NaNs are scalar work.)
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
template <int kBytes>
static inline void prefetch_to_second_level(const void* p) {
  for (int i = 0; i < kBytes; i += 64) _mm_prefetch(static_cast<const char*>(p) + i, _MM_HINT_T1);
}

// For the matrix products (gemm-inl.h): 14 x 32 sums take 28 of the 32 registers.
static constexpr int64_t kRows = 14;

// One vector in memory order.
static inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline Vec load(const BFloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
static inline Vec load(const Float16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
static inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
// Ties to even.
static inline void store(BFloat16* p, Vec a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
static inline void store(Float16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

// out[j][i] = a[i][j] for 16 x 16: pairs, then quads, then blocks of four change places.
static inline void store_transposed(__m512 (&a)[16], float* out, int64_t out_stride) {
  __m512 b[16];
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d low = _mm512_castps_pd(b[i + j]), high = _mm512_castps_pd(b[i + j + 2]);
      a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  // a[4 g + c] now holds columns c, 4 + c, 8 + c, 12 + c of rows 4 g .. 4 g + 3, a quarter each.
  for (int c = 0; c < 4; ++c) {
    const __m512 low_even = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x88);
    const __m512 low_odd = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xdd);
    const __m512 high_even = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88);
    const __m512 high_odd = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xdd);
    _mm512_storeu_ps(out + c * out_stride, _mm512_shuffle_f32x4(low_even, high_even, 0x88));
    _mm512_storeu_ps(out + (4 + c) * out_stride, _mm512_shuffle_f32x4(low_odd, high_odd, 0x88));
    _mm512_storeu_ps(out + (8 + c) * out_stride, _mm512_shuffle_f32x4(low_even, high_even, 0xdd));
    _mm512_storeu_ps(out + (12 + c) * out_stride, _mm512_shuffle_f32x4(low_odd, high_odd, 0xdd));
  }
}

template <class T>
static inline void transpose(const T* in, int64_t in_stride, float* out, int64_t out_stride) {
  __m512 a[16];
  for (int i = 0; i < 16; ++i) a[i] = load(in + i * in_stride).v;
  store_transposed(a, out, out_stride);
}
