// Panels of bfloat16 parts for the products of gemm_amx-inl.h, which describes them. Included
// before it, after gemm-inl.h, inside the namespace and the target region.

namespace amx {

static constexpr int64_t kTile = 16;           // rows, units and columns of a tile
static constexpr int64_t kTileFloats = 256;    // in a tile
static constexpr int64_t kTileDepth = 32;      // values of depth in a tile
static constexpr int64_t kPanel = 2 * kTile;   // rows of a left, columns of a right panel
static constexpr int64_t kGradientPanels = 8;  // left panels a task of gradient_of_weight
static constexpr int64_t kStrip = 8;           // right panels that gradient_of_rows packs at a time
// The rows of a matrix are streams that lie pages apart, more than the hardware prefetches.
static constexpr int64_t kAheadInRow = 256;

// bfloat16 parts that hold a value of T.
template <class T>
struct Parts {
  static constexpr int kCount = 1;
};
template <>
struct Parts<Float16> {
  static constexpr int kCount = 2;
};
template <>
struct Parts<float> {
  static constexpr int kCount = 3;
};

// Vocabulary entries that gradient_of_rows takes at a time: as many as the second-level cache
// holds.
static constexpr int64_t gradient_depth(int parts) { return parts == 1 ? 1024 : 512; }

template <int kParts>
static constexpr int64_t block_floats() {
  return kParts * 2 * kTileFloats;
}

static inline int64_t blocks_of(int64_t depth) { return (depth + kTileDepth - 1) / kTileDepth; }

template <int kParts>
static int64_t panel_floats(int64_t depth) {
  return blocks_of(depth) * block_floats<kParts>();
}

static inline __mmask16 first(int64_t count) {
  return count >= kTile ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

static inline __m512 load_some(const float* p, int64_t count) {
  return _mm512_maskz_loadu_ps(first(count), p);
}
static inline __m512 load_some(const BFloat16* p, int64_t count) {
  const __m256i bits = _mm256_maskz_loadu_epi16(first(count), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
static inline __m512 load_some(const Float16* p, int64_t count) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), p));
}

static inline __m512 widen_half(__m512i parts, int half) {
  const __m256i bits =
      half == 0 ? _mm512_castsi512_si256(parts) : _mm512_extracti64x4_epi64(parts, 1);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// parts[p] = part p of 16 values of `low`, then of 16 of `high`; missing ones are 0.
template <int kParts, class T>
static inline void split(const T* low, int64_t low_count, const T* high, int64_t high_count,
                         __m512i (&parts)[kParts]) {
  __m512 a = load_some(low, low_count), b = load_some(high, high_count);
  for (int p = 0; p < kParts; ++p) {
    parts[p] = (__m512i)_mm512_cvtne2ps_pbh(b, a);
    if (p + 1 == kParts) break;
    a = _mm512_sub_ps(a, widen_half(parts[p], 0));
    b = _mm512_sub_ps(b, widen_half(parts[p], 1));
  }
}
template <>
inline void split<1, BFloat16>(const BFloat16* low, int64_t low_count, const BFloat16* high,
                               int64_t high_count, __m512i (&parts)[1]) {
  const __m256i a = _mm256_maskz_loadu_epi16(first(low_count), low);
  const __m256i b = _mm256_maskz_loadu_epi16(first(high_count), high);
  parts[0] = _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
}

// tile[p][i] = 32 neighbours from in[i * stride] on: [row][unit].
template <int kParts, class T>
static inline void tile_of_rows(const T* in, int64_t stride, int64_t rows, int64_t depth,
                                __m512 (&tile)[kParts][16]) {
  for (int64_t i = 0; i < kTile; ++i) {
    __m512i parts[kParts];
    const T* row = in + (i < rows ? i * stride : 0);
    const int64_t present = i < rows ? depth : 0;
    prefetch_bytes<kTileDepth * sizeof(T)>(row + kAheadInRow);
    split<kParts>(row, present, row + kTile, present - kTile, parts);
    for (int p = 0; p < kParts; ++p) tile[p][i] = _mm512_castsi512_ps(parts[p]);
  }
}

// tile[p][u] = rows 2 u and 2 u + 1 of in, 16 columns, interleaved: [unit][column].
template <int kParts, class T>
static inline void tile_of_columns(const T* in, int64_t stride, int64_t columns, int64_t depth,
                                   __m512 (&tile)[kParts][16]) {
  alignas(64) static constexpr uint16_t kInterleave[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i order = _mm512_load_si512(kInterleave);
  for (int64_t u = 0; u < kTile; ++u) {
    __m512i parts[kParts];
    const T* low = in + (2 * u < depth ? 2 * u * stride : 0);
    const T* high = in + (2 * u + 1 < depth ? (2 * u + 1) * stride : 0);
    prefetch_bytes<kTile * sizeof(T)>(low + kTileDepth * stride);
    prefetch_bytes<kTile * sizeof(T)>(high + kTileDepth * stride);
    split<kParts>(low, 2 * u < depth ? columns : 0, high, 2 * u + 1 < depth ? columns : 0, parts);
    for (int p = 0; p < kParts; ++p) {
      tile[p][u] = _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, parts[p]));
    }
  }
}

template <int kParts, bool kTransposed>
static inline void store_tile(__m512 (&tile)[kParts][16], int64_t which, float* block) {
  for (int p = 0; p < kParts; ++p) {
    float* out = block + (2 * p + which) * kTileFloats;
    if (kTransposed) {
      store_transposed(tile[p], out, kTile);
    } else {
      for (int i = 0; i < 16; ++i) _mm512_storeu_ps(out + i * kTile, tile[p][i]);
    }
  }
}

// A panel from kPanel rows of a matrix, `rows` of them present: left, or transposed a right panel.
template <int kParts, bool kTransposed, class T>
static inline void panel_of_rows(const T* in, int64_t stride, int64_t rows, int64_t depth,
                                 float* panel) {
  for (int64_t k = 0; k < depth; k += kTileDepth, panel += block_floats<kParts>()) {
    for (int64_t which = 0; which < 2; ++which) {
      __m512 tile[kParts][16];
      const int64_t skipped = which * kTile;
      tile_of_rows<kParts>(in + (rows > skipped ? skipped * stride : 0) + k, stride, rows - skipped,
                           depth - k, tile);
      store_tile<kParts, kTransposed>(tile, which, panel);
    }
  }
}

// Panels from neighbouring columns of a matrix, kPanel each: right, or transposed left panels,
// `size` floats apart.
template <int kParts, bool kTransposed, class T>
static inline void panels_of_columns(const T* in, int64_t stride, int64_t columns, int64_t depth,
                                     int64_t size, float* panels) {
  for (int64_t k = 0; k < depth; k += kTileDepth, panels += block_floats<kParts>()) {
    for (int64_t j = 0; j < columns; j += kTile) {
      __m512 tile[kParts][16];
      tile_of_columns<kParts>(in + k * stride + j, stride, columns - j, depth - k, tile);
      store_tile<kParts, kTransposed>(tile, j / kTile % 2, panels + j / kPanel * size);
    }
    if (columns % kPanel != 0 && columns % kPanel <= kTile) {  // the last panel's other half
      __m512 tile[kParts][16];
      tile_of_columns<kParts>(in, stride, 0, 0, tile);
      store_tile<kParts, kTransposed>(tile, 1, panels + columns / kPanel * size);
    }
  }
}

}  // namespace amx
