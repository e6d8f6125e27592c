// Products of float32 linear layers, on the panels and the micro kernel of gemm-inl.h, included
// after it.
//
// The weight is packed first, by all threads, and serves every block of rows. A task packs its own
// rows, which stay in its second-level cache. An element is summed in order of k, in blocks of a
// depth that the shapes alone fix.

// Deeper products are summed in blocks, so that the right panels that a task reads at a time, 590
// KB, stay in the second-level cache for all of its rows.
static constexpr int64_t kLinearDepth = 768;
static constexpr int64_t kTiles = 6;      // right panels at a time
static constexpr int64_t kRowBlock = 12;  // left panels of a task, at most

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

static inline int64_t linear_blocks(int64_t depth) {
  return depth <= kLinearDepth ? 1 : (depth + kLinearDepth - 1) / kLinearDepth;
}

static int64_t linear_workspace(int64_t depth, int64_t low) {
  const int64_t blocks = linear_blocks(depth);
  return kRowBlock * ((depth + blocks - 1) / blocks + low) * kLeft;
}

// The depths [begin, end) of a left panel, with those of an adapter behind them.
static inline void pack_linear_left(const LinearParams& p, int64_t row, int64_t begin, int64_t end,
                                    int64_t low, float* panel) {
  const int64_t count = least(kLeft, p.rows - row), depth = end - begin;
  if (p.left_transposed) {
    pack_straight<kLeft>(p.left + begin * p.rows + row, p.rows, count, depth, panel);
  } else {
    pack_transposed(p.left + row * p.depth + begin, p.depth, count, depth, panel, kLeft);
  }
  if (low == 0) return;
  pack_transposed(p.low_left + row * low, low, count, low, panel + depth * kLeft, kLeft);
}

// Left panels [first_panel, last_panel) times right ones [first_tile, last_tile).
static void linear_product(const LinearParams& p, int64_t first_panel, int64_t last_panel,
                           int64_t first_tile, int64_t last_tile, float* workspace) {
  const int64_t blocks = linear_blocks(p.depth), most = (p.depth + blocks - 1) / blocks;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = least(block * most, p.depth), end = least(begin + most, p.depth);
    // An adapter continues the last block: one that adds zeros leaves every bit as it is.
    const int64_t low = block + 1 == blocks ? p.low : 0, units = end - begin + low;
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      pack_linear_left(p, panel * kRows, begin, end, low,
                       workspace + (panel - first_panel) * units * kLeft);
    }
    const Put put = block == 0 ? Put::kStore : Put::kAdd;
    for (int64_t group = first_tile; group < last_tile; group += kTiles) {
      for (int64_t panel = first_panel; panel < last_panel; ++panel) {
        const int64_t row = panel * kRows;
        const float* left = workspace + (panel - first_panel) * units * kLeft;
        for (int64_t tile = group; tile < least(group + kTiles, last_tile); ++tile) {
          const int64_t column = tile * kColumns;
          micro<Singles>(units, left,
                         p.packed_columns + column * (p.depth + p.low) + begin * kColumns,
                         p.out + row * p.columns + column, p.columns, least(kRows, p.rows - row),
                         least(kColumns, p.columns - column), put);
        }
      }
    }
  }
}

static constexpr Linear linear() {
  return {kRows,
          kColumns,
          kRowBlock,
          kTiles,
          pack_linear_transposed,
          pack_linear_columns,
          linear_workspace,
          linear_product};
}
