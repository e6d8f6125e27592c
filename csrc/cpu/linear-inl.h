// Products of float32 linear layers, on the panels and the micro kernel of gemm-inl.h, included
// after it.
//
// Both matrices are packed before the first product: rows of hidden states by all threads, and the
// weight, which then serves every block of rows. An element is summed in order of k, in blocks of a
// depth that the shapes alone fix.

// Deeper products are summed in blocks, so that the right panels of a task, 590 KB, stay in the
// second-level cache for all of its rows.
static constexpr int64_t kLinearDepth = 768;
static constexpr int64_t kTiles = 6;      // right panels of a task
static constexpr int64_t kRowBlock = 12;  // left panels of a task

static void pack_linear_rows(const float* in, int64_t panel, int64_t depth, int64_t rows,
                             float* out) {
  const int64_t first = panel * kRows;
  pack_transposed(in + first * depth, depth, least(kLeft, rows - first), depth, out, kLeft);
}

static void pack_linear_transposed(const float* in, int64_t tile, int64_t depth, int64_t columns,
                                   float* out) {
  const int64_t first = tile * kColumns;
  pack_rows_as_right<Singles>(in + first * depth, least(kColumns, columns - first), depth, out);
}

static void pack_linear_columns(const float* in, int64_t tile, int64_t depth, int64_t columns,
                                float* out) {
  const int64_t first = tile * kColumns;
  pack_straight<kColumns>(in + first, columns, least(kColumns, columns - first), depth, out);
}

// kRowBlock left panels times kTiles right ones; depth > 0.
static void linear_product(const LinearParams& p, int64_t first_panel, int64_t first_tile) {
  const int64_t panels = least((p.rows + kRows - 1) / kRows, first_panel + kRowBlock);
  const int64_t tiles = least((p.columns + kColumns - 1) / kColumns, first_tile + kTiles);
  // An adapter continues the last block: one that adds zeros leaves every bit as it is.
  const int64_t own = p.depth - p.low;
  const int64_t blocks = own <= kLinearDepth ? 1 : (own + kLinearDepth - 1) / kLinearDepth;
  const int64_t most = (own + blocks - 1) / blocks;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = least(block * most, own), end = least(begin + most, own);
    const int64_t units = (block + 1 == blocks ? p.depth : end) - begin;
    const Put put = block == 0 ? Put::kStore : Put::kAdd;
    for (int64_t panel = first_panel; panel < panels; ++panel) {
      const int64_t row = panel * kRows;
      const float* left = p.packed_rows + (panel * p.depth + begin) * kLeft;
      for (int64_t tile = first_tile; tile < tiles; ++tile) {
        const int64_t column = tile * kColumns;
        micro<Singles>(units, left, p.packed_columns + column * p.depth + begin * kColumns,
                       p.out + row * p.columns + column, p.columns, least(kRows, p.rows - row),
                       least(kColumns, p.columns - column), put);
      }
    }
  }
}

static constexpr Linear linear() {
  return {kRows,
          kLeft,
          kColumns,
          kRowBlock,
          kTiles,
          pack_linear_rows,
          pack_linear_transposed,
          pack_linear_columns,
          linear_product};
}
