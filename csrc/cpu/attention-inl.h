// Attention over a row of shared prompts: every response sees its prompt and itself, causally, and
// no score between two responses is computed. Included after gemm-inl.h, whose panels and micro
// kernel it uses.
//
// A task of the forward pass is one block and one head of the keys with all heads of the queries
// that share it; of the backward pass a whole group, so that the gradients of a prompt's keys are
// added up by one task, in the order of its blocks. Scores of a few rows exist at a time, float32
// whatever the inputs. Products are taken over the keys that the last of those rows sees: what a
// row does not see is -inf there.

static inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

static constexpr int64_t kChunk = 8 * kRows;  // queries a step of the backward pass

// Parts of a workspace, each at a multiple of 16 floats; with a null base only counts.
struct Parts {
  float* base;
  int64_t used;
  float* take(int64_t floats) {
    float* part = base == nullptr ? nullptr : base + used;
    used += round_up(floats, 16);
    return part;
  }
};

struct ForwardParts {
  float *rows, *key_panels, *value_panels, *query, *scores, *weights, *sums;
  int64_t size;
};

static ForwardParts forward_parts(float* base, int64_t keys, int64_t width) {
  const int64_t padded = round_up(keys, kColumns), wide = round_up(width, kColumns);
  Parts parts{base, 0};
  ForwardParts p{};
  p.rows = parts.take(keys * width);
  p.key_panels = parts.take(padded * width);
  p.value_panels = parts.take(keys * wide);
  p.query = parts.take(width * kLeft);
  p.scores = parts.take(kLeft * padded);
  p.weights = parts.take(kLeft * padded);
  p.sums = parts.take(kRows * wide);
  p.size = parts.used;
  return p;
}

struct BackwardParts {
  float *rows, *key_panels, *key_columns, *value_panels;                         // of a block
  float *query, *gradient, *query_columns, *gradient_columns, *scores, *slopes;  // of a chunk
  float *left, *sums, *block_keys, *block_values, *grad_keys, *grad_values;
  int64_t size;
};

static BackwardParts backward_parts(float* base, int64_t keys, int64_t tokens, int64_t width) {
  const int64_t padded = round_up(keys, kColumns), wide = round_up(width, kColumns);
  Parts parts{base, 0};
  BackwardParts p{};
  p.rows = parts.take(keys * width);
  p.key_panels = parts.take(padded * width);
  p.key_columns = parts.take(keys * wide);
  p.value_panels = parts.take(padded * width);
  p.query = parts.take(width * kLeft);
  p.gradient = parts.take(width * kLeft);
  p.query_columns = parts.take(kChunk * wide);
  p.gradient_columns = parts.take(kChunk * wide);
  p.scores = parts.take((kChunk + kLeft) * padded);
  p.slopes = parts.take((kChunk + kLeft) * padded);
  p.left = parts.take((padded > kChunk ? padded : kChunk) * kLeft);
  p.sums = parts.take(kRows * wide);
  p.block_keys = parts.take(keys * wide);
  p.block_values = parts.take(keys * wide);
  p.grad_keys = parts.take(tokens * wide);
  p.grad_values = parts.take(tokens * wide);
  p.size = parts.used;
  return p;
}

static inline int64_t forward_size(int64_t keys, int64_t width) {
  return forward_parts(nullptr, keys, width).size;
}
static inline int64_t backward_size(int64_t keys, int64_t tokens, int64_t width) {
  return backward_parts(nullptr, keys, tokens, width).size;
}

// One head of one token.
template <class T>
static inline const T* at(const HeadsView& view, int64_t token, int64_t head) {
  return static_cast<const T*>(view.data) + token * view.token_stride + head * view.head_stride;
}

template <class T>
static inline void widen_row(const T* in, int64_t width, float* out) {
  int64_t i = 0;
  for (; i + Vec::kWidth <= width; i += Vec::kWidth) store(out + i, load(in + i));
  if (i < width) store_first(out + i, load_first(in + i, width - i), width - i);
}

template <class T>
static inline void write_row(const float* in, float factor, int64_t width, T* out) {
  const Vec factors = set1(factor);
  int64_t i = 0;
  for (; i + Vec::kWidth <= width; i += Vec::kWidth) store(out + i, mul(load(in + i), factors));
  if (i < width) store_first(out + i, mul(load_first(in + i, width - i), factors), width - i);
}

static inline void add_rows(const float* in, int64_t count, float* out) {  // whole vectors
  for (int64_t i = 0; i < count; i += Vec::kWidth) store(out + i, add(load(out + i), load(in + i)));
}

// The keys or values of a block, [keys, width]: its prompt's, then its own.
template <class T>
static void gather(const HeadsView& view, const AttentionBlock& b, int64_t head, int64_t width,
                   float* rows) {
  for (int64_t i = 0; i < b.prompt_count; ++i, rows += width) {
    widen_row(at<T>(view, b.prompt_first + i, head), width, rows);
  }
  for (int64_t i = 0; i < b.count; ++i, rows += width) {
    widen_row(at<T>(view, b.first + i, head), width, rows);
  }
}

// Rows as right panels, for products with their transpose: [panel][width][kColumns].
static void pack_as_columns(const float* rows, int64_t count, int64_t width, float* panels) {
  for (int64_t j = 0; j < count; j += kColumns, panels += width * kColumns) {
    pack_rows_as_right<Singles>(rows + j * width, least(kColumns, count - j), width, panels);
  }
}

// Rows as right panels: [panel][row][kColumns].
template <class T>
static void pack_as_rows(const T* rows, int64_t stride, int64_t count, int64_t width,
                         float* panels) {
  for (int64_t h = 0; h < width; h += kColumns, panels += count * kColumns) {
    pack_straight<kColumns>(rows + h, stride, least(kColumns, width - h), count, panels);
  }
}

// What some queries of a block see of its keys; `begin` and `padded_end` at panels.
struct Span {
  int64_t begin, end, padded_end;
};

static inline Span keys_seen(const AttentionParams& p, const AttentionBlock& b, int64_t query,
                             int64_t rows) {
  const int64_t position = b.prompt_count + query, before = position + 1 - p.window;
  const int64_t begin = before > 0 ? before / kColumns * kColumns : 0;
  return {begin, position + rows, round_up(position + rows, kColumns)};
}

// scores[i, begin : padded_end] = left panel times right panels.
static inline void products(const float* left, const float* panels, int64_t width, Span span,
                            int64_t rows, float* scores, int64_t stride) {
  for (int64_t j = span.begin; j < span.padded_end; j += kColumns) {
    micro<Singles>(width, left, panels + j * width, scores + j, stride, rows, kColumns,
                   Put::kStore);
  }
}

// -inf where the query at that position does not see.
static inline void hide(const AttentionParams& p, int64_t position, Span span, float* scores) {
  const int64_t before = position + 1 - p.window;
  if (before > span.begin) fill(scores + span.begin, before - span.begin, -__builtin_inff());
  fill(scores + position + 1, span.padded_end - position - 1, -__builtin_inff());
}

// 0 in what the chunk's products with the keys read beyond the span of some rows.
static inline void blank(Span chunk, Span span, float* scores) {
  fill(scores + chunk.begin, span.begin - chunk.begin, 0.0f);
  fill(scores + span.padded_end, chunk.padded_end - span.padded_end, 0.0f);
}

// sums [rows, wide] = left [keys of the span, kLeft]^T times right panels of all `keys`.
static inline void weighted(const float* left, const float* panels, int64_t keys, int64_t width,
                            Span span, int64_t rows, float* sums) {
  const int64_t wide = round_up(width, kColumns);
  for (int64_t h = 0; h < width; h += kColumns) {
    micro<Singles>(span.end - span.begin, left, panels + h * keys + span.begin * kColumns, sums + h,
                   wide, rows, kColumns, Put::kStore);
  }
}

// Scores become 2^(scale log2(e) (score - largest)); returns their sum.
static inline float exponentials(float factor, int64_t count, float* scores, float* peak_out) {
  Vec c[6], value, power;
  load_coefficients<5>(1.0f, c);
  Vec peaks = set1(-__builtin_inff());
  for (int64_t j = 0; j < count; j += Vec::kWidth) peaks = max(peaks, load(scores + j));
  const float peak = reduce_max(peaks) * factor;
  const Vec factors = set1(factor), offset = set1(-peak);
  Vec sums = set1(0.0f);
  for (int64_t j = 0; j < count; j += Vec::kWidth) {
    exp2_parts<5>(fma(load(scores + j), factors, offset), c, value, power);
    const Vec weight = mul(value, power);
    sums = add(sums, weight);
    store(scores + j, weight);
  }
  *peak_out = peak;
  return reduce_add(sums);
}

template <class T>
static void attention_forward(const AttentionParams& p, int64_t block, int64_t key_head,
                              float* workspace) {
  const AttentionBlock& b = p.blocks[block];
  const int64_t keys = b.prompt_count + b.count, padded = round_up(keys, kColumns);
  const int64_t width = p.width, wide = round_up(width, kColumns), shared = p.heads / p.key_heads;
  const ForwardParts s = forward_parts(workspace, keys, width);
  gather<T>(p.key, b, key_head, width, s.rows);
  pack_as_columns(s.rows, keys, width, s.key_panels);
  gather<T>(p.value, b, key_head, width, s.rows);
  pack_as_rows(s.rows, width, keys, width, s.value_panels);
  fill(s.scores, kLeft * padded, 0.0f);  // rows of the last panel that are not there
  for (int64_t head = key_head * shared; head < (key_head + 1) * shared; ++head) {
    for (int64_t i = 0; i < b.count; i += kRows) {
      const int64_t rows = least(kRows, b.count - i);
      const Span span = keys_seen(p, b, i, rows);
      pack_transposed(at<T>(p.query, b.first + i, head), p.query.token_stride,
                      least(kLeft, b.count - i), width, s.query, kLeft);
      products(s.query, s.key_panels, width, span, rows, s.scores, padded);
      float inverse[kRows];
      for (int64_t r = 0; r < rows; ++r) {
        float* scores = s.scores + r * padded;
        hide(p, b.prompt_count + i + r, span, scores);
        float peak;
        const float sum = exponentials(p.scale * kLog2E, span.padded_end - span.begin,
                                       scores + span.begin, &peak);
        inverse[r] = 1.0f / sum;
        p.log_sums[head * p.tokens + b.first + i + r] = peak + __builtin_log2f(sum);
      }
      pack_transposed(s.scores + span.begin, padded, kLeft, span.padded_end - span.begin, s.weights,
                      kLeft);
      weighted(s.weights, s.value_panels, keys, width, span, rows, s.sums);
      for (int64_t r = 0; r < rows; ++r) {
        write_row(s.sums + r * wide, inverse[r], width,
                  static_cast<T*>(p.output) + ((b.first + i + r) * p.heads + head) * width);
      }
    }
  }
}

// Of one row: scores become weights, the gradients of the weights those of the scores.
static inline void slopes_of_row(float factor, float log_sum, float delta, float scale,
                                 int64_t count, float* scores, float* slopes) {
  Vec c[6], value, power;
  load_coefficients<5>(1.0f, c);
  const Vec factors = set1(factor), offset = set1(-log_sum), deltas = set1(delta);
  const Vec scales = set1(scale);
  for (int64_t j = 0; j < count; j += Vec::kWidth) {
    exp2_parts<5>(fma(load(scores + j), factors, offset), c, value, power);
    const Vec weight = mul(value, power);
    store(scores + j, weight);
    store(slopes + j, mul(mul(weight, scales), sub(load(slopes + j), deltas)));
  }
}

// out [keys of the span, wide] += scores [rows, keys]^T times right panels of the rows.
static void add_to_keys(const AttentionBlock& b, int64_t query, int64_t rows, Span span,
                        const float* scores, int64_t stride, const float* panels, int64_t width,
                        int64_t keys, float* left, float* out) {
  const int64_t wide = round_up(width, kColumns);
  for (int64_t v = span.begin; v < span.end; v += kRows) {
    const int64_t blind = v - b.prompt_count - query;  // rows before the first that sees any
    const int64_t first = blind > 0 ? blind : 0, depth = rows - first;
    pack_straight<kLeft>(scores + first * stride + v, stride, least(kLeft, span.padded_end - v),
                         depth, left);
    for (int64_t h = 0; h < width; h += kColumns) {
      micro<Singles>(depth, left, panels + h * rows + first * kColumns, out + v * wide + h, wide,
                     least(kRows, keys - v), kColumns, Put::kAdd);
    }
  }
}

// One block and one head of the queries; adds to the gradients of the block's keys and values.
template <class T>
static void backward_of_head(const AttentionParams& p, const AttentionBlock& b, int64_t head,
                             const BackwardParts& s, float* grad_keys, float* grad_values) {
  const int64_t keys = b.prompt_count + b.count, padded = round_up(keys, kColumns);
  const int64_t width = p.width, wide = round_up(width, kColumns);
  for (int64_t begin = 0; begin < b.count; begin += kChunk) {
    const int64_t count = least(kChunk, b.count - begin);
    const Span chunk = keys_seen(p, b, begin, count);
    pack_as_rows(at<T>(p.query, b.first + begin, head), p.query.token_stride, count, width,
                 s.query_columns);
    pack_as_rows(at<T>(p.grad_output, b.first + begin, head), p.grad_output.token_stride, count,
                 width, s.gradient_columns);
    for (int64_t i = begin; i < begin + count; i += kRows) {
      const int64_t rows = least(kRows, begin + count - i);
      const Span span = keys_seen(p, b, i, rows);
      float* scores = s.scores + (i - begin) * padded;
      float* slopes = s.slopes + (i - begin) * padded;
      const int64_t present = least(kLeft, b.count - i);
      pack_transposed(at<T>(p.query, b.first + i, head), p.query.token_stride, present, width,
                      s.query, kLeft);
      products(s.query, s.key_panels, width, span, rows, scores, padded);
      pack_transposed(at<T>(p.grad_output, b.first + i, head), p.grad_output.token_stride, present,
                      width, s.gradient, kLeft);
      products(s.gradient, s.value_panels, width, span, rows, slopes, padded);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t token = b.first + i + r, row = r * padded;
        hide(p, b.prompt_count + i + r, span, scores + row);
        const T* output = static_cast<const T*>(p.output) + (token * p.heads + head) * width;
        slopes_of_row(p.scale * kLog2E, p.log_sums[head * p.tokens + token],
                      dot(output, at<T>(p.grad_output, token, head), width), p.scale,
                      span.padded_end - span.begin, scores + row + span.begin,
                      slopes + row + span.begin);
        blank(chunk, span, scores + row);
        blank(chunk, span, slopes + row);
      }
      pack_transposed(slopes + span.begin, padded, kLeft, span.padded_end - span.begin, s.left,
                      kLeft);
      weighted(s.left, s.key_columns, keys, width, span, rows, s.sums);
      for (int64_t r = 0; r < rows; ++r) {
        write_row(s.sums + r * wide, 1.0f, width,
                  static_cast<T*>(p.grad_query) + ((b.first + i + r) * p.heads + head) * width);
      }
    }
    add_to_keys(b, begin, count, chunk, s.scores, padded, s.gradient_columns, width, keys, s.left,
                grad_values);
    add_to_keys(b, begin, count, chunk, s.slopes, padded, s.query_columns, width, keys, s.left,
                grad_keys);
  }
}

template <class T>
static void attention_backward(const AttentionParams& p, int64_t first, int64_t last,
                               int64_t key_head, float* workspace) {
  const int64_t start = p.blocks[first].first, width = p.width, wide = round_up(width, kColumns);
  const int64_t shared = p.heads / p.key_heads;
  int64_t tokens = 0, most_keys = 0;
  for (int64_t n = first; n < last; ++n) {
    const int64_t keys = p.blocks[n].prompt_count + p.blocks[n].count;
    tokens += p.blocks[n].count;
    most_keys = most_keys > keys ? most_keys : keys;
  }
  const BackwardParts s = backward_parts(workspace, most_keys, tokens, width);
  fill(s.grad_keys, tokens * wide, 0.0f);
  fill(s.grad_values, tokens * wide, 0.0f);
  fill(s.scores, (kChunk + kLeft) * round_up(most_keys, kColumns), 0.0f);
  fill(s.slopes, (kChunk + kLeft) * round_up(most_keys, kColumns), 0.0f);
  for (int64_t n = first; n < last; ++n) {
    const AttentionBlock& b = p.blocks[n];
    const int64_t keys = b.prompt_count + b.count;
    gather<T>(p.key, b, key_head, width, s.rows);
    pack_as_columns(s.rows, keys, width, s.key_panels);
    pack_as_rows(s.rows, width, keys, width, s.key_columns);
    gather<T>(p.value, b, key_head, width, s.rows);
    pack_as_columns(s.rows, keys, width, s.value_panels);
    const bool own = b.prompt_count == 0;  // its keys lie together
    float* grad_keys = own ? s.grad_keys + (b.first - start) * wide : s.block_keys;
    float* grad_values = own ? s.grad_values + (b.first - start) * wide : s.block_values;
    if (!own) {
      fill(s.block_keys, keys * wide, 0.0f);
      fill(s.block_values, keys * wide, 0.0f);
    }
    for (int64_t head = key_head * shared; head < (key_head + 1) * shared; ++head) {
      backward_of_head<T>(p, b, head, s, grad_keys, grad_values);
    }
    if (!own) {
      const int64_t before = b.prompt_count * wide, to = (b.first - start) * wide;
      add_rows(s.block_keys, before, s.grad_keys);
      add_rows(s.block_keys + before, b.count * wide, s.grad_keys + to);
      add_rows(s.block_values, before, s.grad_values);
      add_rows(s.block_values + before, b.count * wide, s.grad_values + to);
    }
  }
  for (int64_t i = 0; i < tokens; ++i) {
    const int64_t to = ((start + i) * p.key_heads + key_head) * width;
    write_row(s.grad_keys + i * wide, 1.0f, width, static_cast<T*>(p.grad_key) + to);
    write_row(s.grad_values + i * wide, 1.0f, width, static_cast<T*>(p.grad_value) + to);
  }
}

static constexpr Attention attention() {
  return {
      {nullptr, attention_forward<float>, attention_forward<BFloat16>, attention_forward<Float16>},
      {nullptr, attention_backward<float>, attention_backward<BFloat16>,
       attention_backward<Float16>},
      forward_size,
      backward_size};
}
