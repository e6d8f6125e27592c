// Log-probabilities of labels from logits [B, T, V].
//
// A row is cut into slices, one block a slice: many rows fill the device, and so do a few long
// ones. Every thread keeps the online (maximum, sum of exponentials) of its own vectors with
// several loads in flight, the block merges them in a fixed order. A second kernel merges a row's
// slices, writes its three numbers, and sums the rows of a sequence. The target never enters the
// sum over the others: subtracting it afterwards would cancel all digits when the model is certain.
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
constexpr int kThreads = 256;
constexpr int kInFlight = 4;  // 16-byte loads that a thread issues before it uses the first
constexpr int kRound = kThreads * kInFlight;  // vectors that a block takes at a time
// Whole rounds, since one that is not full costs the same; 48 KiB: 64 rows of 151936 halves make
// 384 blocks of three rounds, close to three for each of 132 multiprocessors, which hold four at a
// time.
constexpr int kSliceVectors = 3 * kRound;
constexpr int kSequenceThreads = 512;

// Registers for 1024 threads of a multiprocessor; doubles need twice as many.
template <class T>
constexpr int kBlocksPerProcessor = sizeof(T) == 8 ? 2 : 4;

// How every row is cut: kSliceVectors a slice, the last one may have fewer.
struct Cut {
  int64_t rows;
  int slices;
};

// Where the maximum and the sum of a slice of a row are kept: the first slice's where the row's
// will be.
template <class S>
struct SliceResults {
  S* tops;
  S* sums;
};

template <class S>
__device__ __forceinline__ SliceResults<S> results_of_slice(const SeqLogpParams& params,
                                                            int64_t rows, int slice) {
  if (slice == 0) return {static_cast<S*>(params.row_max), static_cast<S*>(params.row_sum)};
  S* tops = static_cast<S*>(params.slices) + int64_t{slice - 1} * 2 * rows;
  return {tops, tops + rows};
}

// Adds a round of vectors to a thread's sum.
template <class T>
__device__ __forceinline__ void add_round(SumExp<StatT<T>>& state, const uint4 (&raw)[kInFlight]) {
  using S = StatT<T>;
  constexpr int kN = kLanes<T>;
  const S top = max_of<T>(raw);
  if (top > state.top) {  // seldom, after the first few rounds
    state.sum = multiply(state.sum, Element<T>::exp(state.top - top));
    state.top = top;
  }
  const S base = state.base();
  S sums[kInFlight];
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    S z[kN];
    unpack<T>(raw[i], z);
#pragma unroll
    for (int k = 0; k < kN; ++k) z[k] = Element<T>::exp(z[k] - base);
#pragma unroll
    for (int width = kN / 2; width > 0; width /= 2) {
#pragma unroll
      for (int k = 0; k < width; ++k) z[k] += z[k + width];
    }
    sums[i] = z[0];
  }
  static_assert(kInFlight == 4);
  state.sum += (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// This thread's share of the sum over vectors [first, last) of a row without its target: first +
// threadIdx, first + threadIdx + kThreads, ... counted from the row's first element, wherever that
// lies in memory. So the order of the sum, and its bits, do not depend on the row's place in the
// batch. Reads nothing outside the row.
template <class T, int kWords>
__device__ __forceinline__ SumExp<StatT<T>> sum_others(const T* row, int64_t vocab, int64_t target,
                                                       int first, int last) {
  constexpr int kN = kLanes<T>;
  const int low = kWords == kAligned ? 0 : 1;  // vectors [low, high) are loaded whole
  const int high = min(static_cast<int>(vocab / kN) - low, last);
  SumExp<StatT<T>> state;
  int start = first + static_cast<int>(threadIdx.x);
  const int target_lane = static_cast<int>(target % kN);
  int to_target = static_cast<int>(target / kN) - start;  // vectors from here to the target's
  for (; start < last; start += kRound, to_target -= kRound) {
    uint4 raw[kInFlight];
    if (start >= low && start + (kRound - kThreads) < high) {
      const T* address = row + int64_t{start} * kN;
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        raw[i] = load_vector<kWords>(address + i * kThreads * kN);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int vector = start + i * kThreads;
        const T* address = row + int64_t{vector} * kN;
        if (vector >= low && vector < high) {
          raw[i] = load_vector<kWords>(address);
        } else {
          raw[i] = load_elements(row, int64_t{vector} * kN, vector < last ? vocab : 0);
        }
      }
    }
    if (static_cast<unsigned>(to_target) < kRound && to_target % kThreads == 0) {
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        raw[i] = without_lane<T>(raw[i], i == to_target / kThreads ? target_lane : kN);
      }
    }
    add_round<T>(state, raw);
  }
  return state;
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor<T>)
    slice_kernel(SeqLogpParams params, Cut cut) {
  using S = StatT<T>;
  const int64_t count = cut.rows * cut.slices;
  for (int64_t work = blockIdx.x; work < count; work += gridDim.x) {
    const int64_t row = work / cut.slices;
    const int slice = static_cast<int>(work % cut.slices);
    const int64_t target = target_of_row(params.rows, row);
    if (target < 0) continue;  // the same for the whole block: nothing of the row is read
    const T* z = static_cast<const T*>(params.logits) +
                 row / params.rows.length * params.batch_stride +
                 row % params.rows.length * params.row_stride;
    // Asked for before the sum, needed after it.
    S z_target = S(0);
    if (slice == 0 && threadIdx.x == 0) z_target = Element<T>::widen(z[target]);
    const int64_t vocab = params.rows.vocab;
    // Vectors are counted in 32 bits: 2^31 of them are 34 GB.
    const int first = slice * kSliceVectors;
    const int last =
        min(first + kSliceVectors, static_cast<int>((vocab + kLanes<T> - 1) / kLanes<T>));
    SumExp<S> others = dispatch_alignment(z, [&](auto alignment) {
      return sum_others<T, alignment.words>(z, vocab, target, first, last);
    });
    others = block_reduce<kThreads>(others);
    if (threadIdx.x == 0) {
      const SliceResults<S> results = results_of_slice<S>(params, cut.rows, slice);
      results.tops[row] = others.top;
      results.sums[row] = others.sum;
      // The target's logit waits where its log-probability will be.
      if (slice == 0) static_cast<S*>(params.token_logps)[row] = z_target;
    }
  }
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

template <class S>
__device__ __forceinline__ RowResult<S> merge_slices(const SeqLogpParams& params, const Cut& cut,
                                                     int64_t row) {
  // Unrolled for loads in flight: with few rows nothing else hides their latency.
  SumExp<S> others;
#pragma unroll 4
  for (int slice = 0; slice < cut.slices; ++slice) {
    others.top = fmax(others.top, results_of_slice<S>(params, cut.rows, slice).tops[row]);
  }
  const S base = others.base();
#pragma unroll 4
  for (int slice = 0; slice < cut.slices; ++slice) {
    const SliceResults<S> results = results_of_slice<S>(params, cut.rows, slice);
    others.sum += multiply(results.sums[row], exp(results.tops[row] - base));
  }
  return finish_row(others, static_cast<const S*>(params.token_logps)[row]);
}

// One block a sequence. Doubles, so that 32k tokens lose nothing; a sequence is short beside a row.
template <class S>
__global__ void __launch_bounds__(kSequenceThreads, 1)
    sequence_kernel(SeqLogpParams params, Cut cut) {
  const int64_t length = params.rows.length;
  for (int64_t sequence = blockIdx.x; sequence < params.rows.batch; sequence += gridDim.x) {
    Total total;
    for (int64_t t = threadIdx.x; t < length; t += kSequenceThreads) {
      const int64_t row = sequence * length + t;
      const int64_t target = target_of_row(params.rows, row);
      RowResult<S> result{target == kIgnoredRow ? S(0) : S(NAN), S(0), S(1)};
      if (target >= 0) result = merge_slices<S>(params, cut, row);
      static_cast<S*>(params.token_logps)[row] = result.logp;
      static_cast<S*>(params.row_max)[row] = result.max;
      static_cast<S*>(params.row_sum)[row] = result.sum;
      total.sum += result.logp;
      total.count += target != kIgnoredRow;
    }
    total = block_reduce<kSequenceThreads>(total);
    if (threadIdx.x == 0) {
      const double scale = !params.average ? 1.0 : total.count > 0 ? 1.0 / total.count : 0.0;
      static_cast<S*>(params.sequence_logps)[sequence] = static_cast<S>(total.sum * scale);
      static_cast<S*>(params.sequence_scale)[sequence] = static_cast<S>(scale);
    }
  }
}

template <class T>
int forward(const SeqLogpParams& params, Stream stream) {
  using S = StatT<T>;
  Cut cut{};
  cut.rows = params.rows.rows();
  cut.slices = static_cast<int>(seq_logp_slices(params.dtype, params.rows.vocab));
  if (cut.rows > 0) {
    const int error = launch_kernel(slice_kernel<T>, cut.rows * cut.slices, kThreads,
                                    block_reduce_bytes<kThreads, SumExp<S>>(), stream, params, cut);
    if (error != cudaSuccess) return error;
  }
  return launch_kernel(sequence_kernel<S>, params.rows.batch, kSequenceThreads,
                       block_reduce_bytes<kSequenceThreads, Total>(), stream, params, cut);
}

}  // namespace

int64_t seq_logp_slices(DType dtype, int64_t vocab) {
  return dispatch_dtype(dtype, [&](auto tag) {
    const int64_t elements = int64_t{kSliceVectors} * kLanes<typename decltype(tag)::type>;
    return vocab > elements ? (vocab + elements - 1) / elements : int64_t{1};
  });
}

int seq_logp_forward(const SeqLogpParams& params, Stream stream) {
  if (params.rows.batch == 0) return cudaSuccess;
  return dispatch_dtype(params.dtype, [&](auto tag) {
    return forward<typename decltype(tag)::type>(params, stream);
  });
}

}  // namespace pyfast_dpo::cuda
