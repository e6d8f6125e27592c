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

template <class T, class Gradient>
static void gradient_of_rows(const HeadParams& p, int64_t first_row, int64_t last_row,
                             int64_t begin, int64_t end, float* workspace) {
  constexpr int kParts = Parts<T>::kCount;
  const Gradient* gradient = static_cast<const Gradient*>(p.gradient);
  const TileRegisters registers;
  const int64_t panels = (last_row - first_row + kPanel - 1) / kPanel;
  constexpr int64_t kDepth = gradient_depth(kParts);
  const int64_t size = panel_floats<kParts>(kDepth);
  float* right = workspace + panels * size;
  for (int64_t v = begin; v < end; v += kDepth) {
    const int64_t depth = least(kDepth, end - v);
    for (int64_t i = first_row; i < last_row; i += kPanel) {
      panel_of_rows<kParts, false>(gradient + i * p.gradient_stride + v, p.gradient_stride,
                                   last_row - i, depth,
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

template <class T, class Gradient, class Out>
static void gradient_of_weight(const HeadParams& p, int64_t block, float* workspace) {
  constexpr int kParts = Parts<T>::kCount;
  const TileRegisters registers;
  const int64_t first_entry = block * kGradientPanels * kPanel;
  const int64_t last_entry = least(p.vocab, first_entry + kGradientPanels * kPanel);
  const int64_t size = panel_floats<kParts>(p.rows);
  panels_of_columns<kParts, true>(static_cast<const Gradient*>(p.gradient) + first_entry,
                                  p.gradient_stride, last_entry - first_entry, p.rows, size,
                                  workspace);
  for (int64_t h = 0; h < p.hidden; h += kPanel) {
    for (int64_t v = first_entry; v < last_entry; v += kPanel) {
      const int64_t offset = v * p.hidden + h;
      multiply_into<kParts>(
          blocks_of(p.rows), workspace + (v - first_entry) / kPanel * size,
          p.packed_columns + h / kPanel * size, p.total == nullptr ? nullptr : p.total + offset,
          static_cast<Out*>(p.grad_weight) + offset, p.hidden, p.vocab - v, p.hidden - h);
    }
  }
}

static constexpr Gemm gemm() {
  return {
      kPanel,
      kPanel,
      kGradientPanels,
      kStrip,
      {0, gradient_depth(3), gradient_depth(1), gradient_depth(2)},
      {nullptr, panel_floats<3>, panel_floats<1>, panel_floats<2>},
      {nullptr, panel_floats<3>, panel_floats<1>, panel_floats<2>},
      {nullptr, pack_rows<float>, pack_rows<BFloat16>, pack_rows<Float16>},
      {nullptr, pack_right<float>, pack_right<BFloat16>, pack_right<Float16>},
      {nullptr, logits_tile<float>, logits_tile<BFloat16>, logits_tile<Float16>},
      {{nullptr, gradient_of_rows<float, float>, gradient_of_rows<BFloat16, float>,
        gradient_of_rows<Float16, float>},
       {nullptr, nullptr, gradient_of_rows<BFloat16, BFloat16>, nullptr}},
      {{nullptr, gradient_of_weight<float, float, float>,
        gradient_of_weight<BFloat16, float, float>, gradient_of_weight<Float16, float, float>},
       {nullptr, nullptr, gradient_of_weight<BFloat16, BFloat16, float>, nullptr}},
      {{nullptr, gradient_of_weight<float, float, float>,
        gradient_of_weight<BFloat16, float, BFloat16>, gradient_of_weight<Float16, float, Float16>},
       {nullptr, nullptr, gradient_of_weight<BFloat16, BFloat16, BFloat16>, nullptr}}};
}

}  // namespace amx
