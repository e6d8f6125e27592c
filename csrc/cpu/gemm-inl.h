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

static constexpr int64_t kDepth = 512;      // vocabulary entries a block of gradient_of_rows
static constexpr int64_t kPanels = 8;       // left panels a task of gradient_of_weight
static constexpr int64_t kStrips = 4;       // right panels that it takes at a time
static constexpr int64_t kPanelsAhead = 8;  // left panels whose products hide a wait for memory
static constexpr int64_t kStreamFloats = 8 << 20;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// What becomes of a product: stored, added to what is there, or stored past the caches.
enum class Put { kStore, kAdd, kStream };

// Of a product whose matrix has that many floats. Past the caches saves the reading of every line
// before it is written, where the matrix consists of whole lines and is larger than the caches.
static inline Put put_into(const float* matrix, int64_t rows, int64_t columns) {
  const bool whole = reinterpret_cast<uintptr_t>(matrix) % 64 == 0 && columns % 16 == 0;
  return whole && rows * columns >= kStreamFloats ? Put::kStream : Put::kStore;
}

// Called at every k of a micro kernel: fetches nothing.
struct NothingAhead {
  void operator()(int64_t) const {}
};

// Fetches rows of memory that is packed after kPanelsAhead micro kernels of full depth, spread over
// them: lines a page apart, which the hardware does not see coming. The gradient of 226 rows became
// 10 % faster. Earlier fetches would have left the cache again.
template <class T, class Format>
struct RowsAhead {
  static constexpr int64_t kEvery = kPanelsAhead * Format::units(kDepth) / kDepth;
  const T* rows;  // null: nothing
  int64_t stride;
  void operator()(int64_t k) const {
    if (rows != nullptr && k % kEvery == 0) {
      prefetch_to_second_level<kColumns * sizeof(T)>(rows + k / kEvery * stride);
    }
  }
};

// c[i, j] (+)= sum over k of a[k][i] b[k][j] for kCount rows, of which `rows` are stored, and
// `columns` of the columns.
template <class Format, int kCount, class Ahead>
static inline void micro_rows(int64_t units, const float* a, const float* b, float* c,
                              int64_t c_stride, int64_t rows, int64_t columns, Put put,
                              Ahead ahead) {
  Vec left[kCount], right[kCount], b_left, b_right;
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) left[i] = right[i] = set1(0.0f);
  if (put != Put::kStream) {  // they arrive while the sums are made
    for (int64_t i = 0; i < rows; ++i) prefetch_bytes<kColumns * sizeof(float)>(c + i * c_stride);
  }
  for (int64_t k = 0; k < units; ++k, a += kLeft, b += kColumns) {
    ahead(k);
    load_pair(b, b_left, b_right);
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) {
      const Vec factor = set1(a[i]);
      left[i] = Format::multiply_add(factor, b_left, left[i]);
      right[i] = Format::multiply_add(factor, b_right, right[i]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) {
    if (i >= rows) continue;
    float* row = c + i * c_stride;
    if (columns < kColumns) {
      float sums[kColumns];
      store_pair(sums, left[i], right[i]);
      for (int64_t j = 0; j < columns; ++j) row[j] = put == Put::kAdd ? row[j] + sums[j] : sums[j];
    } else if (put == Put::kStream) {
      stream_pair(row, left[i], right[i]);
    } else {
      if (put == Put::kAdd) {
        load_pair(row, b_left, b_right);
        left[i] = add(b_left, left[i]);
        right[i] = add(b_right, right[i]);
      }
      store_pair(row, left[i], right[i]);
    }
  }
}

// The same with no more sums than the rows of a last panel need, up to one: sums for rows that are
// not there took 5 % of a product of 226 rows.
template <class Format, int kCount = kRows, class Ahead = NothingAhead>
static inline void micro(int64_t units, const float* a, const float* b, float* c, int64_t c_stride,
                         int64_t rows, int64_t columns, Put put, Ahead ahead = {}) {
  if constexpr (kCount > 2) {
    if (rows <= kCount - 2) {
      micro<Format, kCount - 2>(units, a, b, c, c_stride, rows, columns, put, ahead);
      return;
    }
  }
  micro_rows<Format, kCount>(units, a, b, c, c_stride, rows, columns, put, ahead);
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

// Up to kColumns rows as one right panel, for products with their transpose: [unit][kColumns].
template <class Format, class T>
static inline void pack_rows_as_right(const T* rows, int64_t count, int64_t depth, float* panel) {
  for (int64_t half = 0; half < kColumns; half += Vec::kWidth) {
    const int64_t present = count > half ? least(Vec::kWidth, count - half) : 0;
    Format::pack_rows(rows + half * depth, depth, present, depth, panel + half, kColumns);
  }
}

// logits[:, tile] = rows weight[tile]^T for one tile of kColumns vocabulary entries.
template <class T, class Format>
static void logits_tile(const HeadParams& p, int64_t tile, float* workspace) {
  const int64_t first = tile * kColumns, columns = least(kColumns, p.vocab - first);
  const int64_t units = Format::units(p.hidden);
  const T* weight = static_cast<const T*>(p.weight) + first * p.hidden;
  pack_rows_as_right<Format>(weight, columns, p.hidden, workspace);
  const Put put = put_into(p.logits, p.rows, p.vocab);
  for (int64_t i = 0; i < p.rows; i += kRows) {
    micro<Format>(units, p.packed_rows + i / kRows * units * kLeft, workspace,
                  p.logits + i * p.vocab + first, p.vocab, least(kRows, p.rows - i), columns, put);
  }
}

// grad_rows[first:last] = gradient[first:last, begin:end] weight[begin:end], in blocks of the
// vocabulary.
template <class T, class Gradient, class Format>
static void gradient_of_rows(const HeadParams& p, int64_t first, int64_t last, int64_t begin,
                             int64_t end, float* workspace) {
  const Gradient* gradient = static_cast<const Gradient*>(p.gradient);
  const T* weight = static_cast<const T*>(p.weight);
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
      const T* strip = weight + v * p.hidden + h;
      Format::template pack_columns<kColumns>(strip, p.hidden, columns, depth, right);
      const bool is_last = h + 2 * kColumns > p.hidden;
      const T* next = is_last ? strip - h + kDepth * p.hidden : strip + kColumns;
      const bool is_next_whole = v + (is_last ? 2 : 1) * kDepth <= end;
      for (int64_t i = first; i < last; i += kRows) {
        const int64_t panel = (i - first) / kRows, ahead = panel - (panels - kPanelsAhead);
        const int64_t done = ahead * (kDepth / kPanelsAhead);
        const RowsAhead<T, Format> rows{
            is_next_whole && ahead >= 0 ? next + done * p.hidden : nullptr, p.hidden};
        micro<Format>(units, left + panel * units * kLeft, right, p.grad_rows + i * p.hidden + h,
                      p.hidden, least(kRows, last - i), columns,
                      v > begin ? Put::kAdd : Put::kStore, rows);
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
  // Some strips at a time: longer pieces of every row of the result are written together.
  const Put put = p.total != nullptr
                      ? Put::kAdd
                      : put_into(static_cast<float*>(p.grad_weight), p.vocab, p.hidden);
  for (int64_t begin = 0; begin < p.hidden; begin += kStrips * kColumns) {
    const int64_t end = least(p.hidden, begin + kStrips * kColumns);
    for (int64_t v = first; v < last; v += kRows) {
      const float* left = workspace + (v - first) / kRows * units * kLeft;
      const int64_t rows = least(kRows, last - v);
      for (int64_t h = begin; h < end; h += kColumns) {
        const int64_t offset = v * p.hidden + h, columns = least(kColumns, p.hidden - h);
        const float* right = p.packed_columns + h * units;
        if constexpr (sizeof(Out) == sizeof(float)) {
          micro<Format>(units, left, right, static_cast<float*>(p.grad_weight) + offset, p.hidden,
                        rows, columns, put);
          continue;
        }
        float sums[kRows * kColumns];
        micro<Format>(units, left, right, sums, kColumns, rows, columns, Put::kStore);
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
