// The lm_head's three matrix products by AMX: 16 x 16 sums in a tile register, 32 values of depth
// an instruction. Included after gemm-inl.h, inside the namespace and the target region.
//
// A tile multiplies bfloat16 only, exactly, into float32 sums. A float16 value is the sum of two
// bfloat16 values and a float32 value that of three, so that such matrices take 4 or 6 products of
// their parts: sums as exact as float32 arithmetic gives, at a multiple of its speed. (Of the 9
// products of three parts the 3 smallest are below the rounding of the sum.)
//
// Panels are blocks of kTileDepth values of depth: [block][part][2 tiles][16][16 units]; a unit is
// two neighbours in k. Left tiles are [row][unit], right tiles [unit][column].

namespace amx {

static constexpr int64_t kTile = 16;           // rows, units and columns of a tile
static constexpr int64_t kTileFloats = 256;    // in a tile
static constexpr int64_t kTileDepth = 32;      // values of depth in a tile
static constexpr int64_t kPanel = 2 * kTile;   // rows of a left, columns of a right panel
static constexpr int64_t kGradientPanels = 8;  // left panels a task of gradient_of_weight
static constexpr int64_t kStrip = 8;  // right panels that gradient_of_rows packs at a time
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

// --- packing ------------------------------------------------------------------------------------

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

// Panels from neighbouring columns of a matrix, kPanel each: right, or transposed left panels, `size`
// floats apart.
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

// --- products -----------------------------------------------------------------------------------

// Sets the eight tile registers to 16 x 64 bytes for as long as it lives.
struct TileRegisters {
  TileRegisters() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } const config;
    _tile_loadconfig(&config);
  }
  ~TileRegisters() { _tile_release(); }
};

// Which parts meet, small products first; one of the two stays in its registers at every step.
template <int kParts>
struct Meetings;
template <>
struct Meetings<1> {
  static constexpr int kCount = 1, kLeft[] = {0}, kRight[] = {0};
};
template <>
struct Meetings<2> {
  static constexpr int kCount = 4, kLeft[] = {1, 1, 0, 0}, kRight[] = {1, 0, 0, 1};
};
template <>
struct Meetings<3> {
  static constexpr int kCount = 6, kLeft[] = {1, 1, 2, 0, 0, 0}, kRight[] = {1, 0, 0, 0, 1, 2};
};

// Adds a block's products to the sums in tile registers 0 to 3.
template <int kParts, int kStep>
static inline void multiply_block(const float* a, const float* b) {
  using M = Meetings<kParts>;
  if constexpr (kStep < M::kCount) {
    constexpr int kBefore = kStep == 0 ? 0 : kStep - 1;
    constexpr int kLeft = 2 * M::kLeft[kStep] * kTileFloats;
    constexpr int kRight = 2 * M::kRight[kStep] * kTileFloats;
    constexpr bool kNewLeft = kStep == 0 || M::kLeft[kStep] != M::kLeft[kBefore];
    constexpr bool kNewRight = kStep == 0 || M::kRight[kStep] != M::kRight[kBefore];
    // Loads between the products, which run while they wait.
    if (kNewLeft) _tile_loadd(4, a + kLeft, 64);
    if (kNewRight) _tile_loadd(6, b + kRight, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (kNewRight) _tile_loadd(7, b + kRight + kTileFloats, 64);
    _tile_dpbf16ps(1, 4, 7);
    if (kNewLeft) _tile_loadd(5, a + kLeft + kTileFloats, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    multiply_block<kParts, kStep + 1>(a, b);
  }
}

// c[32 x 32] = start + sum over the blocks of a b; start null: 0.
template <int kParts>
static inline void multiply(int64_t blocks, const float* a, const float* b, const float* start,
                            int64_t start_stride, float* c, int64_t c_stride) {
  __asm__ volatile("" ::: "memory");  // tile loads do not tell the compiler that they read memory
  if (start == nullptr) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    const int64_t bytes = start_stride * 4;
    _tile_loadd(0, start, bytes);
    _tile_loadd(1, start + kTile, bytes);
    _tile_loadd(2, start + kTile * start_stride, bytes);
    _tile_loadd(3, start + kTile * start_stride + kTile, bytes);
  }
  for (int64_t k = 0; k < blocks; ++k) {
    multiply_block<kParts, 0>(a, b);
    a += block_floats<kParts>();
    b += block_floats<kParts>();
  }
  const int64_t bytes = c_stride * 4;
  _tile_stored(0, c, bytes);
  _tile_stored(1, c + kTile, bytes);
  _tile_stored(2, c + kTile * c_stride, bytes);
  _tile_stored(3, c + kTile * c_stride + kTile, bytes);
}

static inline void store_values(float* p, __m512 v, __mmask16 mask) {
  _mm512_mask_storeu_ps(p, mask, v);
}
static inline void store_values(BFloat16* p, __m512 v, __mmask16 mask) {
  _mm256_mask_storeu_epi16(p, mask, (__m256i)_mm512_cvtneps_pbh(v));
}
static inline void store_values(Float16* p, __m512 v, __mmask16 mask) {
  _mm256_mask_storeu_epi16(p, mask, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

template <class Out>
static inline float* as_floats(Out*) {
  return nullptr;
}
static inline float* as_floats(float* p) { return p; }

// The same for a corner of `rows` x `columns`, and for sums that are rounded when they are stored.
template <int kParts, class Out>
static inline void multiply_into(int64_t blocks, const float* a, const float* b, const float* start,
                                 Out* out, int64_t stride, int64_t rows, int64_t columns) {
  const bool whole = rows >= kPanel && columns >= kPanel;
  if (whole && as_floats(out) != nullptr) {
    multiply<kParts>(blocks, a, b, start, stride, as_floats(out), stride);
    return;
  }
  alignas(64) float sums[kPanel * kPanel];
  const float* from = start;
  int64_t from_stride = stride;
  if (!whole && start != nullptr) {
    for (int64_t i = 0; i < kPanel; ++i) {
      for (int64_t j = 0; j < kPanel; j += kTile) {
        const int64_t present = i < rows ? columns - j : 0;
        _mm512_store_ps(sums + i * kPanel + j,
                        load_some(present > 0 ? start + i * stride + j : start, present));
      }
    }
    from = sums;
    from_stride = kPanel;
  }
  multiply<kParts>(blocks, a, b, from, from_stride, sums, kPanel);
  for (int64_t i = 0; i < least(rows, kPanel); ++i) {
    for (int64_t j = 0; j < least(columns, kPanel); j += kTile) {
      store_values(out + i * stride + j, _mm512_load_ps(sums + i * kPanel + j), first(columns - j));
    }
  }
}

// out[j, i] = (a b)[i, j]: `columns` rows of `rows` elements. Whole ones are stored past the
// caches: logits are far larger than they are.
template <int kParts>
static inline void multiply_transposed(int64_t blocks, const float* a, const float* b, float* out,
                                       int64_t stride, int64_t rows, int64_t columns) {
  alignas(64) float sums[kPanel * kPanel], turned[kPanel * kPanel];
  multiply<kParts>(blocks, a, b, nullptr, 0, sums, kPanel);
  for (int64_t i = 0; i < kPanel; i += kTile) {
    for (int64_t j = 0; j < kPanel; j += kTile) {
      __m512 tile[16];
      for (int64_t k = 0; k < kTile; ++k) tile[k] = _mm512_load_ps(sums + (i + k) * kPanel + j);
      store_transposed(tile, turned + j * kPanel + i, kPanel);
    }
  }
  const bool stream =
      rows >= kPanel && reinterpret_cast<uintptr_t>(out) % 64 == 0 && stride % kTile == 0;
  for (int64_t j = 0; j < least(columns, kPanel); ++j) {
    for (int64_t i = 0; i < least(rows, kPanel); i += kTile) {
      const __m512 values = _mm512_load_ps(turned + j * kPanel + i);
      if (stream) {
        _mm512_stream_ps(out + j * stride + i, values);
      } else {
        store_values(out + j * stride + i, values, first(rows - i));
      }
    }
  }
}

// --- tasks --------------------------------------------------------------------------------------

// The rows of the logits are the right side of their product, so that it is the sums, and not the
// larger weight, which are transposed.
template <class T>
static void pack_rows(const void* in, int64_t rows, int64_t depth, float* panels) {
  constexpr int kParts = Parts<T>::kCount;
  for (int64_t i = 0; i < rows; i += kPanel, panels += panel_floats<kParts>(depth)) {
    panel_of_rows<kParts, true>(static_cast<const T*>(in) + i * depth, depth, rows - i, depth,
                                panels);
  }
}

template <class T>
static void pack_right(const void* in, int64_t rows, int64_t columns, float* panels) {
  constexpr int kParts = Parts<T>::kCount;
  panels_of_columns<kParts, false>(static_cast<const T*>(in), columns, columns, rows,
                                   panel_floats<kParts>(rows), panels);
}

template <class T>
static void logits_tile(const HeadParams& p, int64_t tile, float* workspace) {
  constexpr int kParts = Parts<T>::kCount;
  const TileRegisters registers;
  const int64_t first_entry = tile * kPanel, size = panel_floats<kParts>(p.hidden);
  const T* weight = static_cast<const T*>(p.weight) + first_entry * p.hidden;
  panel_of_rows<kParts, false>(weight, p.hidden, p.vocab - first_entry, p.hidden, workspace);
  for (int64_t i = 0; i < p.rows; i += kPanel) {
    multiply_transposed<kParts>(blocks_of(p.hidden), workspace, p.packed_rows + i / kPanel * size,
                                p.logits + i * p.vocab + first_entry, p.vocab,
                                p.vocab - first_entry, p.rows - i);
  }
}

template <class T>
static void gradient_of_rows(const HeadParams& p, int64_t first_row, int64_t last_row,
                             int64_t begin, int64_t end, float* workspace) {
  constexpr int kParts = Parts<T>::kCount;
  const TileRegisters registers;
  const int64_t panels = (last_row - first_row + kPanel - 1) / kPanel;
  constexpr int64_t kDepth = gradient_depth(kParts);
  const int64_t size = panel_floats<kParts>(kDepth);
  float* right = workspace + panels * size;
  for (int64_t v = begin; v < end; v += kDepth) {
    const int64_t depth = least(kDepth, end - v);
    for (int64_t i = first_row; i < last_row; i += kPanel) {
      panel_of_rows<kParts, false>(p.logits + i * p.vocab + v, p.vocab, last_row - i, depth,
                                   workspace + (i - first_row) / kPanel * size);
    }
    for (int64_t strip = 0; strip < p.hidden; strip += kStrip * kPanel) {
      const int64_t columns = least(kStrip * kPanel, p.hidden - strip);
      panels_of_columns<kParts, false>(static_cast<const T*>(p.weight) + v * p.hidden + strip,
                                       p.hidden, columns, depth, size, right);
      for (int64_t j = 0; j < columns; j += kPanel) {
        for (int64_t i = first_row; i < last_row; i += kPanel) {
          float* out = p.grad_rows + i * p.hidden + strip + j;
          multiply_into<kParts>(blocks_of(depth), workspace + (i - first_row) / kPanel * size,
                                right + j / kPanel * size, v > begin ? out : nullptr, out, p.hidden,
                                last_row - i, columns - j);
        }
      }
    }
  }
}

template <class T, class Out>
static void gradient_of_weight(const HeadParams& p, int64_t block, float* workspace) {
  constexpr int kParts = Parts<T>::kCount;
  const TileRegisters registers;
  const int64_t first_entry = block * kGradientPanels * kPanel;
  const int64_t last_entry = least(p.vocab, first_entry + kGradientPanels * kPanel);
  const int64_t size = panel_floats<kParts>(p.rows);
  panels_of_columns<kParts, true>(p.logits + first_entry, p.vocab, last_entry - first_entry, p.rows,
                                  size, workspace);
  for (int64_t h = 0; h < p.hidden; h += kPanel) {
    for (int64_t v = first_entry; v < last_entry; v += kPanel) {
      const int64_t offset = v * p.hidden + h;
      multiply_into<kParts>(blocks_of(p.rows), workspace + (v - first_entry) / kPanel * size,
                            p.packed_columns + h / kPanel * size,
                            p.total == nullptr ? nullptr : p.total + offset,
                            static_cast<Out*>(p.grad_weight) + offset, p.hidden, p.vocab - v,
                            p.hidden - h);
    }
  }
}

static constexpr Gemm gemm() {
  return {kPanel,
          kPanel,
          kGradientPanels,
          kStrip,
          {0, gradient_depth(3), gradient_depth(1), gradient_depth(2)},
          {nullptr, panel_floats<3>, panel_floats<1>, panel_floats<2>},
          {nullptr, panel_floats<3>, panel_floats<1>, panel_floats<2>},
          {nullptr, pack_rows<float>, pack_rows<BFloat16>, pack_rows<Float16>},
          {nullptr, pack_right<float>, pack_right<BFloat16>, pack_right<Float16>},
          {nullptr, logits_tile<float>, logits_tile<BFloat16>, logits_tile<Float16>},
          {nullptr, gradient_of_rows<float>, gradient_of_rows<BFloat16>, gradient_of_rows<Float16>},
          {nullptr, gradient_of_weight<float, float>, gradient_of_weight<BFloat16, float>,
           gradient_of_weight<Float16, float>},
          {nullptr, gradient_of_weight<float, float>, gradient_of_weight<BFloat16, BFloat16>,
           gradient_of_weight<Float16, Float16>}};
}

}  // namespace amx
