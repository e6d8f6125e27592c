// The format of bfloat16 matrices for CPUs with a pairwise dot product (AVX-512 BF16). Included
// after gemm-inl.h.
//
// A 32-bit unit of a panel holds two neighbours in k, so a panel has half the depth; products are
// exact and sums float32. Logits are not rounded at all; the gradient of the logits is rounded to
// bfloat16, as the inputs of every bfloat16 product are.

static inline BFloat16 as_bfloat16(BFloat16 x) { return x; }
static inline BFloat16 as_bfloat16(float x) { return narrow<BFloat16>(x); }

// 16 units from 32 neighbours of a row.
static inline __m512 load_units(const BFloat16* p) { return _mm512_loadu_ps(p); }
static inline __m512 load_units(const float* p) {
  return _mm512_castsi512_ps(
      (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(p + 16), _mm512_loadu_ps(p)));
}

// 16 neighbours of a row as bfloat16, each in the low half of a lane.
static inline __m512i load_low_halves(const BFloat16* p) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline __m512i load_low_halves(const float* p) {
  return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(p)));
}

struct Pairs {
  static constexpr int64_t units(int64_t depth) { return (depth + 1) / 2; }

  static inline Vec multiply_add(Vec a, Vec b, Vec c) {
    return {_mm512_dpbf16_ps(c.v, (__m512bh)_mm512_castps_si512(a.v),
                             (__m512bh)_mm512_castps_si512(b.v))};
  }

  // The unit of in[k], in[k + step]; the second is 0 when it is not there.
  template <class T>
  static inline float unit(const T* in, int64_t step, bool has_second) {
    const uint32_t low = as_bfloat16(in[0]).bits;
    const uint32_t high = has_second ? as_bfloat16(in[step]).bits : 0;
    return bits_to_float(high << 16 | low);
  }

  // panel[u][i] = unit of in[i * stride + 2 u] and its neighbour; see pack_transposed.
  template <class T>
  static inline void pack_rows(const T* in, int64_t stride, int64_t count, int64_t depth,
                               float* panel, int64_t panel_stride) {
    int64_t k = 0;
    if (count == 16) {
      for (; k + 32 <= depth; k += 32) {
        __m512 rows[16];
        for (int i = 0; i < 16; ++i) rows[i] = load_units(in + i * stride + k);
        store_transposed(rows, panel + k / 2 * panel_stride, panel_stride);
      }
    }
    for (; k < depth; k += 2) {
      for (int64_t i = 0; i < 16; ++i) {
        panel[k / 2 * panel_stride + i] =
            i < count ? unit(in + i * stride + k, 1, k + 1 < depth) : 0.0f;
      }
    }
  }

  // panel[u][j] = unit of in[2 u * stride + j] and the row below it; see pack_straight.
  template <int64_t kCount, class T>
  static inline void pack_columns(const T* in, int64_t stride, int64_t count, int64_t depth,
                                  float* panel) {
    for (int64_t k = 0; k < depth; k += 2, in += 2 * stride, panel += kCount) {
      const bool has_second = k + 1 < depth;
      if (count == kCount && has_second) {
        for (int64_t j = 0; j < kCount; j += 16) {
          const __m512i high = _mm512_slli_epi32(load_low_halves(in + stride + j), 16);
          _mm512_storeu_si512(panel + j, _mm512_or_si512(load_low_halves(in + j), high));
        }
      } else {
        for (int64_t j = 0; j < kCount; ++j) {
          panel[j] = j < count ? unit(in + j, stride, has_second) : 0.0f;
        }
      }
    }
  }
};
