// Log-probabilities of labels from logits [B, T, V], forward and backward.
//
// Forward: one block a row. Every thread keeps the online (maximum, sum of exponentials) of its own
// vectors with several loads in flight, the block merges them in a fixed order, one thread writes
// three numbers. A second kernel sums a sequence's rows. The target never enters the sum over the
// others: subtracting it afterwards would cancel all digits when the model is certain. Backward:
// elementwise, so a row may be cut among blocks.
#include <cuda_runtime.h>
#include <math.h>

#include "common/math.h"
#include "common/params.h"
#include "cuda/launch.h"
#include "cuda/launch_kernel.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"

namespace pyfast_dpo::cuda {
namespace {

// The order of a sum follows from these and V alone, so they may not depend on the batch.
constexpr int kRowThreads = 512;
constexpr int kSequenceThreads = 256;
constexpr int kInFlight = 4;  // 16-byte loads a thread issues before it uses the first

// Backward cuts rows into slices until there are about this many blocks (a few for each of the 100
// to 200 multiprocessors of a large GPU).
constexpr int kBackwardThreads = 256;
constexpr int64_t kBackwardBlocks = 2048;

// Two blocks overlap one another's start and end. Doubles need the registers more.
template <class T>
constexpr int kBlocksPerProcessor = sizeof(T) == 8 ? 1 : 2;

template <class T>  // elements between a thread's vectors
constexpr int64_t kBackwardStep = int64_t{kBackwardThreads} * kLanes<T>;

// Adds a vector of a row to a thread's sum, without lane `excluded` (-1: with all of them).
template <class T>
__device__ __forceinline__ void add_vector(SumExp<StatT<T>>& state, uint4 raw, int excluded) {
  using S = StatT<T>;
  constexpr int kN = kLanes<T>;
  S z[kN];
  unpack<T>(raw, z);
  if (excluded >= 0) {  // one test a vector, not one an element
#pragma unroll
    for (int k = 0; k < kN; ++k) z[k] = k == excluded ? -S(INFINITY) : z[k];
  }
  S top = z[0];
#pragma unroll
  for (int k = 1; k < kN; ++k) top = fmax(top, z[k]);
  if (top > state.top) {  // seldom, after the first few vectors
    state.sum = multiply(state.sum, Element<T>::exp(state.top - top));
    state.top = top;
  }
  const S base = state.base();
#pragma unroll
  for (int k = 0; k < kN; ++k) z[k] = Element<T>::exp(z[k] - base);
#pragma unroll
  for (int width = kN / 2; width > 0; width /= 2) {
#pragma unroll
    for (int k = 0; k < width; ++k) z[k] += z[k + width];
  }
  state.sum += z[0];
}

// This thread's share of the sum over a row without its target: vectors threadIdx, threadIdx +
// kRowThreads, ... counted from the row's first element, wherever that lies in memory. So the order
// of the sum, and its bits, do not depend on the row's place in the batch. Reads nothing outside
// the row. (Vectors are counted in 32 bits: 2^31 of them are 34 GB.)
template <class T, bool kAligned>
__device__ __forceinline__ SumExp<StatT<T>> sum_others(const T* row, int64_t vocab,
                                                       int64_t target) {
  constexpr int kN = kLanes<T>;
  const int thread = static_cast<int>(threadIdx.x);
  const int count = static_cast<int>((vocab + kN - 1) / kN);
  const int low = kAligned ? 0 : 1;  // vectors [low, high) are loaded whole, the ends by elements
  const int reach = static_cast<int>(vocab / kN) - low;
  const int high = reach > low ? reach : low;
  const int target_vector = static_cast<int>(target / kN);
  const int target_lane = static_cast<int>(target % kN);
  const auto excluded = [&](int vector) { return vector == target_vector ? target_lane : -1; };

  SumExp<StatT<T>> state;
  if (!kAligned && thread == 0) {
    add_vector<T>(state, load_elements(row, 0, vocab), excluded(0));
  }
  for (int start = thread; start < high; start += kInFlight * kRowThreads) {
    const T* address = row + int64_t{start} * kN;
    uint4 raw[kInFlight];
    if (start >= low && start < high - (kInFlight - 1) * kRowThreads) {
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        raw[i] = load_vector<kAligned>(address + i * kRowThreads * kN);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int vector = start + i * kRowThreads;
        raw[i] = load_elements(row, 0, 0);  // adds nothing
        if (vector >= low && vector < high) {
          raw[i] = load_vector<kAligned>(address + i * kRowThreads * kN);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      add_vector<T>(state, raw[i], excluded(start + i * kRowThreads));
    }
  }
  for (int vector = high; vector < count; ++vector) {  // at most two
    if (vector % kRowThreads == thread) {
      add_vector<T>(state, load_elements(row, int64_t{vector} * kN, vocab), excluded(vector));
    }
  }
  return state;
}

template <class S>
struct RowResult {
  S logp, max, sum;
};

template <class S>
__device__ __forceinline__ RowResult<S> finish_row(const SumExp<S>& others, S z) {
  const SumExp<S> all = others.merge({z, S(1)});
  // A NaN or +inf somewhere, or nothing but -inf: no distribution, as in torch.
  if (all.sum != all.sum || all.top == -S(INFINITY)) return {S(NAN), all.top, S(NAN)};
  // The difference first: at offsets of 1e4 the maximum's last bit is worth 1e-3.
  const S lse_above_target = (others.top - z) + log(others.sum);
  return {S(0) - softplus(lse_above_target), all.top, all.sum};
}

template <class T>
__global__ void __launch_bounds__(kRowThreads, kBlocksPerProcessor<T>)
    row_forward_kernel(SeqLogpParams params, int64_t count) {
  using S = StatT<T>;
  S* logps = static_cast<S*>(params.token_logps);
  S* maxima = static_cast<S*>(params.row_max);
  S* sums = static_cast<S*>(params.row_sum);
  for (int64_t row = blockIdx.x; row < count; row += gridDim.x) {
    const int64_t target = target_of_row(params.rows, row);
    if (target < 0) {  // the same for the whole block: nothing of the row is read
      if (threadIdx.x == 0) {
        logps[row] = target == kIgnoredRow ? S(0) : S(NAN);
        maxima[row] = S(0);
        sums[row] = S(1);
      }
      continue;
    }
    const T* z = static_cast<const T*>(params.logits) +
                 row / params.rows.length * params.batch_stride +
                 row % params.rows.length * params.row_stride;
    const S z_target = Element<T>::widen(z[target]);  // early, beside the first loads
    const int64_t vocab = params.rows.vocab;
    const SumExp<S> others =
        block_reduce<kRowThreads>(misalignment(z) == 0 ? sum_others<T, true>(z, vocab, target)
                                                       : sum_others<T, false>(z, vocab, target));
    if (threadIdx.x == 0) {
      const RowResult<S> result = finish_row(others, z_target);
      logps[row] = result.logp;
      maxima[row] = result.max;
      sums[row] = result.sum;
    }
  }
}

// One block a sequence. Doubles, so that 32k tokens lose nothing; a sequence is short beside a row.
template <class S>
__global__ void __launch_bounds__(kSequenceThreads) sequence_kernel(SeqLogpParams params) {
  const S* logps = static_cast<const S*>(params.token_logps);
  const int64_t length = params.rows.length;
  for (int64_t sequence = blockIdx.x; sequence < params.rows.batch; sequence += gridDim.x) {
    Total total;
    for (int64_t t = threadIdx.x; t < length; t += kSequenceThreads) {
      const int64_t row = sequence * length + t;
      total.sum += logps[row];
      total.count += target_of_row(params.rows, row) != kIgnoredRow;
    }
    total = block_reduce<kSequenceThreads>(total);
    if (threadIdx.x == 0) {
      const double scale = !params.average ? 1.0 : total.count > 0 ? 1.0 / total.count : 0.0;
      static_cast<S*>(params.sequence_logps)[sequence] = static_cast<S>(total.sum * scale);
      static_cast<S*>(params.sequence_scale)[sequence] = static_cast<S>(scale);
    }
  }
}

// Backward: gradient[i] = scale * exp(z[i] - max) for i of [0, count), by vectors aligned to the
// gradient and by elements before `head` and after the last whole vector. `z` may be `gradient`:
// every element is read before it is written, by the thread that writes it. (When they differ in
// alignment they are different memory, and reading next to an element is harmless.)
template <class T, bool kAligned>
__device__ __forceinline__ void write_slice(const T* z, T* gradient, int64_t head, int64_t count,
                                            StatT<T> scale, StatT<T> max) {
  using S = StatT<T>;
  constexpr int kN = kLanes<T>;
  constexpr int kDepth = kAligned ? kInFlight : 1;  // shifted loads: rare, many registers
  const int64_t tail = head + (count - head) / kN * kN;
  const auto write_element = [&](int64_t i) {
    gradient[i] = Element<T>::narrow(scale * Element<T>::exp(Element<T>::widen(z[i]) - max));
  };
  for (int64_t i = threadIdx.x; i < head; i += kBackwardThreads) write_element(i);
  for (int64_t i = tail + threadIdx.x; i < count; i += kBackwardThreads) write_element(i);
  for (int64_t start = head + int64_t{threadIdx.x} * kN; start < tail;
       start += kDepth * kBackwardStep<T>) {
    uint4 raw[kDepth];
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      const int64_t first = start + i * kBackwardStep<T>;
      if (first >= tail) continue;
      const bool whole = kAligned || (first >= kN && first + 2 * kN <= count);
      raw[i] = whole ? load_vector<kAligned>(z + first) : load_elements(z, first, count);
    }
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      const int64_t first = start + i * kBackwardStep<T>;
      if (first >= tail) continue;
      S values[kN];
      unpack<T>(raw[i], values);
#pragma unroll
      for (int k = 0; k < kN; ++k) values[k] = scale * Element<T>::exp(values[k] - max);
      __stcs(reinterpret_cast<uint4*>(gradient + first), pack<T>(values));
    }
  }
}

template <class T>
__device__ __forceinline__ void fill_slice(T* gradient, int64_t head, int64_t count,
                                           StatT<T> value) {
  constexpr int kN = kLanes<T>;
  const int64_t tail = head + (count - head) / kN * kN;
  StatT<T> values[kN];
#pragma unroll
  for (int k = 0; k < kN; ++k) values[k] = value;
  const uint4 raw = pack<T>(values);
  const T element = Element<T>::narrow(value);
  for (int64_t i = threadIdx.x; i < head; i += kBackwardThreads) gradient[i] = element;
  for (int64_t i = tail + threadIdx.x; i < count; i += kBackwardThreads) gradient[i] = element;
  for (int64_t i = head + int64_t{threadIdx.x} * kN; i < tail; i += kBackwardStep<T>) {
    __stcs(reinterpret_cast<uint4*>(gradient + i), raw);
  }
}

template <class T>
__global__ void __launch_bounds__(kBackwardThreads, sizeof(T) == 8 ? 2 : 3)
    backward_kernel(SeqLogpBackwardParams params, int64_t slices, int64_t count) {
  using S = StatT<T>;
  for (int64_t work = blockIdx.x; work < count; work += gridDim.x) {
    const int64_t row = work / slices, slice = work % slices;
    const int64_t b = row / params.rows.length, t = row % params.rows.length;
    // This block's part of the row, cut at whole vectors.
    const int64_t vectors = (params.rows.vocab + kLanes<T> - 1) / kLanes<T>;
    const int64_t begin = vectors * slice / slices * kLanes<T>;
    const int64_t cut = vectors * (slice + 1) / slices * kLanes<T>;
    const int64_t end = cut < params.rows.vocab ? cut : params.rows.vocab;
    T* gradient = static_cast<T*>(params.grad_logits) + b * params.grad_batch_stride +
                  t * params.grad_row_stride + begin;
    const int64_t unaligned = (16 - misalignment(gradient)) % 16 / int64_t{sizeof(T)};
    const int64_t head = unaligned < end - begin ? unaligned : end - begin;

    const int64_t target = target_of_row(params.rows, row);
    if (target < 0) {
      fill_slice(gradient, head, end - begin, target == kIgnoredRow ? S(0) : S(NAN));
      continue;
    }
    const T* z = static_cast<const T*>(params.logits) + b * params.batch_stride +
                 t * params.row_stride + begin;
    S coefficient = S(0);
    if (params.grad_sequence != nullptr) {
      coefficient = static_cast<const S*>(params.grad_sequence)[b] *
                    static_cast<const S*>(params.sequence_scale)[b];
    }
    if (params.grad_token != nullptr) coefficient += static_cast<const S*>(params.grad_token)[row];
    const S scale = -coefficient / static_cast<const S*>(params.row_sum)[row];
    const S max = static_cast<const S*>(params.row_max)[row];
    if (misalignment(z + head) == 0) {
      write_slice<T, true>(z, gradient, head, end - begin, scale, max);
    } else {
      write_slice<T, false>(z, gradient, head, end - begin, scale, max);
    }
    // The target last, over what its thread wrote like any other: no test for it in the loop.
    __syncthreads();
    if (threadIdx.x == 0 && target >= begin && target < end) {
      const S logp = static_cast<const S*>(params.token_logps)[row];
      gradient[target - begin] = Element<T>::narrow(coefficient * -expm1(logp));
    }
  }
}

template <class T>
int forward(const SeqLogpParams& params, Stream stream) {
  using S = StatT<T>;
  if (params.rows.rows() > 0) {
    const int error = launch_kernel(row_forward_kernel<T>, params.rows.rows(), kRowThreads,
                                    block_reduce_bytes<kRowThreads, SumExp<S>>(), stream, params,
                                    params.rows.rows());
    if (error != cudaSuccess) return error;
  }
  return launch_kernel(sequence_kernel<S>, params.rows.batch, kSequenceThreads,
                       block_reduce_bytes<kSequenceThreads, Total>(), stream, params);
}

template <class T>
int backward(const SeqLogpBackwardParams& params, Stream stream) {
  const int64_t rows = params.rows.rows();
  const int64_t wanted = (kBackwardBlocks + rows - 1) / rows;
  const int64_t full = kInFlight * kBackwardStep<T>;  // work for every thread of a block
  const int64_t useful = (params.rows.vocab + full - 1) / full;
  const int64_t slices = wanted < useful ? wanted : useful;
  return launch_kernel(backward_kernel<T>, rows * slices, kBackwardThreads, 0, stream, params,
                       slices, rows * slices);
}

}  // namespace

int seq_logp_forward(const SeqLogpParams& params, Stream stream) {
  if (params.rows.batch == 0) return cudaSuccess;
  return dispatch_dtype(params.dtype, [&](auto tag) {
    return forward<typename decltype(tag)::type>(params, stream);
  });
}

int seq_logp_backward(const SeqLogpBackwardParams& params, Stream stream) {
  if (params.rows.rows() == 0 || params.rows.vocab == 0) return cudaSuccess;
  return dispatch_dtype(params.dtype, [&](auto tag) {
    return backward<typename decltype(tag)::type>(params, stream);
  });
}

}  // namespace pyfast_dpo::cuda
