// Rows of any length as vectors. Included after kernels-inl.h.

static inline void fill(float* p, int64_t count, float value) {
  for (int64_t i = 0; i < count; ++i) p[i] = value;
}

// The first elements of a vector, the others 0; and the other way.
template <class T>
static inline Vec load_first(const T* in, int64_t count) {
  T buffer[Vec::kWidth] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = in[i];
  return load(buffer);
}
template <class T>
static inline void store_first(T* out, Vec a, int64_t count) {
  T buffer[Vec::kWidth];
  store(buffer, a);
  for (int64_t i = 0; i < count; ++i) out[i] = buffer[i];
}

// At most a whole vector.
template <class T>
static inline Vec load_some(const T* in, int64_t count) {
  return count < Vec::kWidth ? load_first(in, count) : load(in);
}
template <class T>
static inline void store_some(T* out, Vec a, int64_t count) {
  if (count < Vec::kWidth) {
    store_first(out, a, count);
  } else {
    store(out, a);
  }
}

template <class T>
static inline float dot(const T* a, const T* b, int64_t width) {
  Vec sums = set1(0.0f);
  int64_t i = 0;
  for (; i + Vec::kWidth <= width; i += Vec::kWidth) sums = fma(load(a + i), load(b + i), sums);
  if (i < width) sums = fma(load_first(a + i, width - i), load_first(b + i, width - i), sums);
  return reduce_add(sums);
}
