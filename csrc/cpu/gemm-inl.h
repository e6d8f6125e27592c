// The lm_head's three matrix products, written once against simd_*.h and included after it, inside
// the namespace and the target region of one instruction set.
//
// All three end in the same micro kernel over packed panels: kRows x kColumns sums in registers,
// one multiply-add for each of them and each k, in order of k. So an element's value depends
// neither on the number of threads nor on the rows that share its batch. Everything is packed: rows
// of a weight lie a multiple of a page apart in common models, and such strides fall on the same
// few cache lines.

static constexpr int64_t kColumns = 2 * Vec::kWidth;  // of a right panel: [k][kColumns]
static constexpr int64_t kLeft =
    Vec::kWidth;  // stride of a left panel: [k][kLeft], kRows of them used

static constexpr int64_t kDepth = 512;  // vocabulary entries a block of gradient_of_rows
static constexpr int64_t kPanels = 8;   // left panels a task of gradient_of_weight

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// c[i, j] (+)= sum over k of a[k][i] b[k][j]; only `rows` x `columns` of the sums are stored.
template <class Format>
static inline void micro(int64_t units, const float* a, const float* b, float* c, int64_t c_stride,
                         int64_t rows, int64_t columns, bool accumulate) {
  Vec left[kRows], right[kRows], b_left, b_right;
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) left[i] = right[i] = set1(0.0f);
  // They arrive while the sums are made.
  for (int64_t i = 0; i < rows; ++i) prefetch_bytes<kColumns * sizeof(float)>(c + i * c_stride);
  for (int64_t k = 0; k < units; ++k, a += kLeft, b += kColumns) {
    load_pair(b, b_left, b_right);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Vec factor = set1(a[i]);
      left[i] = Format::multiply_add(factor, b_left, left[i]);
      right[i] = Format::multiply_add(factor, b_right, right[i]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    if (i >= rows) continue;
    float* row = c + i * c_stride;
    if (columns == kColumns) {
      if (accumulate) {
        load_pair(row, b_left, b_right);
        left[i] = add(b_left, left[i]);
        right[i] = add(b_right, right[i]);
      }
      store_pair(row, left[i], right[i]);
    } else {
      float sums[kColumns];
      store_pair(sums, left[i], right[i]);
      for (int64_t j = 0; j < columns; ++j) row[j] = accumulate ? row[j] + sums[j] : sums[j];
    }
  }
}

// panel[k][i] = in[i * stride + k], `count` of the kWidth wide rows present; the others are 0.
template <class T>
static inline void pack_transposed(const T* in, int64_t stride, int64_t count, int64_t depth,
                                   float* panel, int64_t panel_stride) {
  constexpr int64_t kW = Vec::kWidth;
  int64_t k = 0;
  if (count == kW) {
    for (; k + kW <= depth; k += kW) {
      transpose(in + k, stride, panel + k * panel_stride, panel_stride);
    }
  }
  for (; k < depth; ++k) {
    for (int64_t i = 0; i < kW; ++i) {
      panel[k * panel_stride + i] = i < count ? widen(in[i * stride + k]) : 0.0f;
    }
  }
}

// panel[k][j] = in[k * stride + j] for kCount columns, `count` of them present; the others are 0.
template <int64_t kCount, class T>
static inline void pack_straight(const T* in, int64_t stride, int64_t count, int64_t depth,
                                 float* panel) {
  for (int64_t k = 0; k < depth; ++k, in += stride, panel += kCount) {
    if (count == kCount) {
      for (int64_t j = 0; j < kCount; j += Vec::kWidth) store(panel + j, load(in + j));
    } else {
      for (int64_t j = 0; j < kCount; ++j) panel[j] = j < count ? widen(in[j]) : 0.0f;
    }
  }
}

// What a panel holds for one k: a float, whatever the type of the matrix.
struct Singles {
  static constexpr int64_t units(int64_t depth) { return depth; }
  static inline Vec multiply_add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
  template <class T>
  static inline void pack_rows(const T* in, int64_t stride, int64_t count, int64_t depth,
                               float* panel, int64_t panel_stride) {
    pack_transposed(in, stride, count, depth, panel, panel_stride);
  }
  template <int64_t kCount, class T>
  static inline void pack_columns(const T* in, int64_t stride, int64_t count, int64_t depth,
                                  float* panel) {
    pack_straight<kCount>(in, stride, count, depth, panel);
  }
};

// Rows as left panels, one after another: [panel][unit][kLeft].
template <class T, class Format>
static void pack_left(const void* in, int64_t rows, int64_t depth, float* panels) {
  for (int64_t i = 0; i < rows; i += kRows, panels += Format::units(depth) * kLeft) {
    Format::pack_rows(static_cast<const T*>(in) + i * depth, depth, least(kLeft, rows - i), depth,
                      panels, kLeft);
  }
}

// Columns as right panels: [panel][unit][kColumns].
template <class T, class Format>
static void pack_right(const void* in, int64_t rows, int64_t columns, float* panels) {
  for (int64_t j = 0; j < columns; j += kColumns, panels += Format::units(rows) * kColumns) {
    Format::template pack_columns<kColumns>(static_cast<const T*>(in) + j, columns,
                                            least(kColumns, columns - j), rows, panels);
  }
}

// logits[:, tile] = rows weight[tile]^T for one tile of kColumns vocabulary entries.
template <class T, class Format>
static void logits_tile(const HeadParams& p, int64_t tile, float* workspace) {
  const int64_t first = tile * kColumns, columns = least(kColumns, p.vocab - first);
  const int64_t units = Format::units(p.hidden);
  const T* weight = static_cast<const T*>(p.weight) + first * p.hidden;
  for (int64_t half = 0; half < kColumns; half += Vec::kWidth) {
    const int64_t present = columns > half ? least(Vec::kWidth, columns - half) : 0;
    Format::pack_rows(weight + half * p.hidden, p.hidden, present, p.hidden, workspace + half,
                      kColumns);
  }
  for (int64_t i = 0; i < p.rows; i += kRows) {
    micro<Format>(units, p.packed_rows + i / kRows * units * kLeft, workspace,
                  p.logits + i * p.vocab + first, p.vocab, least(kRows, p.rows - i), columns,
                  false);
  }
}

// grad_rows[first:last] = gradient[first:last, begin:end] weight[begin:end], in blocks of the
// vocabulary.
template <class T, class Gradient, class Format>
static void gradient_of_rows(const HeadParams& p, int64_t first, int64_t last, int64_t begin,
                             int64_t end, float* workspace) {
  const Gradient* gradient = static_cast<const Gradient*>(p.gradient);
  const int64_t panels = (last - first + kRows - 1) / kRows;
  float* left = workspace;
  float* right = workspace + panels * Format::units(kDepth) * kLeft;
  for (int64_t v = begin; v < end; v += kDepth) {
    const int64_t depth = least(kDepth, end - v), units = Format::units(depth);
    for (int64_t i = first; i < last; i += kRows) {
      Format::pack_rows(gradient + i * p.gradient_stride + v, p.gradient_stride,
                        least(kLeft, last - i), depth, left + (i - first) / kRows * units * kLeft,
                        kLeft);
    }
    for (int64_t h = 0; h < p.hidden; h += kColumns) {
      const int64_t columns = least(kColumns, p.hidden - h);
      Format::template pack_columns<kColumns>(static_cast<const T*>(p.weight) + v * p.hidden + h,
                                              p.hidden, columns, depth, right);
      for (int64_t i = first; i < last; i += kRows) {
        micro<Format>(units, left + (i - first) / kRows * units * kLeft, right,
                      p.grad_rows + i * p.hidden + h, p.hidden, least(kRows, last - i), columns,
                      v > begin);
      }
    }
  }
}

// grad_weight[block] = total + gradient[:, block]^T rows for one block of kPanels left panels.
template <class Out, class Gradient, class Format>
static void gradient_of_weight(const HeadParams& p, int64_t block, float* workspace) {
  const int64_t first = block * kPanels * kRows, last = least(p.vocab, first + kPanels * kRows);
  const int64_t units = Format::units(p.rows);
  for (int64_t v = first; v < last; v += kRows) {
    Format::template pack_columns<kLeft>(static_cast<const Gradient*>(p.gradient) + v,
                                         p.gradient_stride, least(kLeft, p.vocab - v), p.rows,
                                         workspace + (v - first) / kRows * units * kLeft);
  }
  for (int64_t h = 0; h < p.hidden; h += kColumns) {
    for (int64_t v = first; v < last; v += kRows) {
      const int64_t offset = v * p.hidden + h;
      const int64_t rows = least(kRows, last - v), columns = least(kColumns, p.hidden - h);
      const float* left = workspace + (v - first) / kRows * units * kLeft;
      const float* right = p.packed_columns + h * units;
      if constexpr (sizeof(Out) == sizeof(float)) {
        micro<Format>(units, left, right, static_cast<float*>(p.grad_weight) + offset, p.hidden,
                      rows, columns, p.total != nullptr);
        continue;
      }
      float sums[kRows * kColumns];
      micro<Format>(units, left, right, sums, kColumns, rows, columns, false);
      Out* out = static_cast<Out*>(p.grad_weight) + offset;
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) {
          const int64_t at = i * p.hidden + j;
          const float before = p.total == nullptr ? 0.0f : p.total[offset + at];
          out[at] = narrow<Out>(before + sums[i * kColumns + j]);
        }
      }
    }
  }
}

template <class Format>
static int64_t left_size(int64_t depth) {
  return Format::units(depth) * kLeft;
}

template <class Format>
static int64_t right_size(int64_t depth) {
  return Format::units(depth) * kColumns;
}

// Bf16: the format of bfloat16 matrices.
template <class Bf16>
static constexpr Gemm gemm() {
  return {
      kRows,
      kColumns,
      kPanels,
      1,
      {0, kDepth, kDepth, kDepth},
      {nullptr, left_size<Singles>, left_size<Bf16>, left_size<Singles>},
      {nullptr, right_size<Singles>, right_size<Bf16>, right_size<Singles>},
      {nullptr, pack_left<float, Singles>, pack_left<BFloat16, Bf16>, pack_left<Float16, Singles>},
      {nullptr, pack_right<float, Singles>, pack_right<BFloat16, Bf16>,
       pack_right<Float16, Singles>},
      {nullptr, logits_tile<float, Singles>, logits_tile<BFloat16, Bf16>,
       logits_tile<Float16, Singles>},
      {{nullptr, gradient_of_rows<float, float, Singles>, gradient_of_rows<BFloat16, float, Bf16>,
        gradient_of_rows<Float16, float, Singles>},
       {nullptr, nullptr, gradient_of_rows<BFloat16, BFloat16, Bf16>, nullptr}},
      {{nullptr, gradient_of_weight<float, float, Singles>, gradient_of_weight<float, float, Bf16>,
        gradient_of_weight<float, float, Singles>},
       {nullptr, nullptr, gradient_of_weight<float, BFloat16, Bf16>, nullptr}},
      {{nullptr, gradient_of_weight<float, float, Singles>,
        gradient_of_weight<BFloat16, float, Bf16>, gradient_of_weight<Float16, float, Singles>},
       {nullptr, nullptr, gradient_of_weight<BFloat16, BFloat16, Bf16>, nullptr}}};
}
