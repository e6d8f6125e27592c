// Multiply-adds of this CPU with nothing but registers: what no product can be faster than.
#include <cstdint>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// In any vector register.
#if defined(__x86_64__)
#define PFD_IN_REGISTER "+v"
#else
#define PFD_IN_REGISTER "+w"
#endif

#if defined(__AVX512F__)
constexpr int kFloats = 16, kChains = 28;
#elif defined(__AVX__)
constexpr int kFloats = 8, kChains = 12;
#else
constexpr int kFloats = 4, kChains = 12;
#endif
typedef float Vec __attribute__((vector_size(4 * kFloats)));

// Enough independent sums to hide the latency, few enough to stay in registers.
template <class MultiplyAdd>
void run(int64_t rounds, MultiplyAdd multiply_add) {
  Vec sums[kChains] = {}, a = {}, b = {};
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 28
    for (int c = 0; c < kChains; ++c) {
      // No product is known, no sum unused.
      asm volatile("" : PFD_IN_REGISTER(a), PFD_IN_REGISTER(sums[c]));
      sums[c] = multiply_add(a, b, sums[c]);
    }
  }
}

// Spends so many operations (a multiply-add is two) on that many threads together; half: of
// bfloat16 with float32 sums. False: this CPU has no such instruction.
extern "C" bool spend(double operations, int threads, bool half) {
#if !defined(__AVX512BF16__)
  if (half) return false;
#endif
  const double a_round = 2.0 * kFloats * kChains * (half ? 2 : 1) * threads;
  const auto rounds = static_cast<int64_t>(operations / a_round);
  std::vector<std::thread> team;
  for (int t = 0; t < threads; ++t) {
    team.emplace_back([=] {
#if defined(__AVX512BF16__)
      if (half) {
        run(rounds, [](Vec a, Vec b, Vec sum) {
          return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
        });
        return;
      }
#endif
      run(rounds, [](Vec a, Vec b, Vec sum) { return a * b + sum; });
    });
  }
  for (auto& thread : team) thread.join();
  return true;
}
