// Faults for tests/fuzz/test_fuzz_finds.py: what the sanitizers must see.
#include <cstdint>

extern "C" float planted_sum(const float* values, int64_t count, int fault) {
  const int64_t end = fault == 1 ? count + 1 : count;  // 1: reads beyond the end
  float sum = 0;
  for (int64_t i = 0; i < end; ++i) sum += values[i];
  const int shift = fault == 2 ? 40 : 1;  // 2: a shift beyond the width
  return sum + static_cast<float>((static_cast<int>(count) << shift) * 0);
}
