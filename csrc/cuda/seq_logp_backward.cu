// Gradient of the log-probabilities of labels with respect to logits [B, T, V]: elementwise, so a
// row may be cut among blocks in any way.
#include <cuda_runtime.h>
#include <math.h>

#include "common/params.h"
#include "cuda/launch.h"
#include "cuda/launch_kernel.cuh"
#include "cuda/vec.cuh"

namespace pyfast_dpo::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight =
    4;  // vectors of the gradient that a thread loads before it writes the first
// Rows are cut into slices until there are about this many blocks (a few for each of the 100 to 200
// multiprocessors of a large GPU).
constexpr int64_t kBlocks = 2048;

template <class G>  // elements between a thread's vectors
constexpr int64_t kStep = int64_t{kThreads} * kLanes<G>;

// Of one entry, d below the row's maximum: exp(d) * (scale + slope * d), slope 0 without an
// entropy's gradient. Where exp(d) is 0 the product is, also with d = -inf.
template <class T>
struct EntryGradient {
  using S = StatT<T>;
  S max, scale, slope;
  __device__ __forceinline__ S operator()(S z) const {
    constexpr S kLowest = sizeof(S) == 8 ? S(-750) : S(-104);
    const S distance = z - max;
    return Element<T>::exp(distance) * (scale + slope * (distance > kLowest ? distance : kLowest));
  }
};

// gradient[i] = gradient_of(z[i]) for i of [0, count), by vectors aligned to the gradient and
// by elements before `head` and after the last whole vector. `z` may be `gradient`: every element
// is read before it is written, by the thread that writes it. A vector of a half gradient takes two
// of float logits. (Logits whose vectors are not aligned where those of the gradient are, are rare:
// they are loaded by elements.)
template <class T, class G, bool kVectors>
__device__ __forceinline__ void write_slice(const T* z, G* gradient, int64_t head, int64_t count,
                                            const EntryGradient<T>& gradient_of) {
  using S = StatT<T>;
  constexpr int kN = kLanes<G>;
  constexpr int kParts = kN / kLanes<T>;
  constexpr int kDepth = kVectors ? kInFlight / kParts : 1;
  const int64_t tail = head + (count - head) / kN * kN;
  const auto write_element = [&](int64_t i) {
    gradient[i] = Element<G>::narrow(gradient_of(Element<T>::widen(z[i])));
  };
  for (int64_t i = threadIdx.x; i < head; i += kThreads) write_element(i);
  for (int64_t i = tail + threadIdx.x; i < count; i += kThreads) write_element(i);
  for (int64_t start = head + int64_t{threadIdx.x} * kN; start < tail; start += kDepth * kStep<G>) {
    uint4 raw[kDepth][kParts];
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      const int64_t first = start + i * kStep<G>;
      if (first >= tail) continue;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const int64_t at = first + part * kLanes<T>;
        raw[i][part] = kVectors ? load_vector<kAligned>(z + at) : load_elements(z, at, count);
      }
    }
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      const int64_t first = start + i * kStep<G>;
      if (first >= tail) continue;
      S values[kN];
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        S z_part[kLanes<T>];
        unpack<T>(raw[i][part], z_part);
#pragma unroll
        for (int k = 0; k < kLanes<T>; ++k) {
          values[part * kLanes<T> + k] = gradient_of(z_part[k]);
        }
      }
      __stcs(reinterpret_cast<uint4*>(gradient + first), pack<G>(values));
    }
  }
}

template <class G>
__device__ __forceinline__ void fill_slice(G* gradient, int64_t head, int64_t count,
                                           StatT<G> value) {
  constexpr int kN = kLanes<G>;
  const int64_t tail = head + (count - head) / kN * kN;
  StatT<G> values[kN];
#pragma unroll
  for (int k = 0; k < kN; ++k) values[k] = value;
  const uint4 raw = pack<G>(values);
  const G element = Element<G>::narrow(value);
  for (int64_t i = threadIdx.x; i < head; i += kThreads) gradient[i] = element;
  for (int64_t i = tail + threadIdx.x; i < count; i += kThreads) gradient[i] = element;
  for (int64_t i = head + int64_t{threadIdx.x} * kN; i < tail; i += kStep<G>) {
    __stcs(reinterpret_cast<uint4*>(gradient + i), raw);
  }
}

template <class T, class G>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 3)
    backward_kernel(SeqLogpBackwardParams params, int64_t slices, int64_t count) {
  using S = StatT<T>;
  for (int64_t work = blockIdx.x; work < count; work += gridDim.x) {
    const int64_t row = work / slices, slice = work % slices;
    const int64_t b = row / params.rows.length, t = row % params.rows.length;
    // This block's part of the row, cut at whole vectors.
    const int64_t vectors = (params.rows.vocab + kLanes<G> - 1) / kLanes<G>;
    const int64_t begin = vectors * slice / slices * kLanes<G>;
    const int64_t cut = vectors * (slice + 1) / slices * kLanes<G>;
    const int64_t end = cut < params.rows.vocab ? cut : params.rows.vocab;
    G* gradient = static_cast<G*>(params.grad_logits) + b * params.grad_batch_stride +
                  t * params.grad_row_stride + begin;
    const int64_t unaligned = (16 - misalignment(gradient)) % 16 / int64_t{sizeof(G)};
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
    const S sum = static_cast<const S*>(params.row_sum)[row];
    EntryGradient<T> gradient_of{static_cast<const S*>(params.row_max)[row], -coefficient / sum,
                                 S(0)};
    S incoming = S(0), entropy = S(0);
    if (params.grad_entropy != nullptr) {
      incoming = static_cast<const S*>(params.grad_entropy)[row];
      entropy = static_cast<const S*>(params.entropy)[row];
      gradient_of.slope = -incoming / sum;
      gradient_of.scale += gradient_of.slope * (entropy - log(sum));
    }
    if (misalignment(z + head) == 0) {
      write_slice<T, G, true>(z, gradient, head, end - begin, gradient_of);
    } else {
      write_slice<T, G, false>(z, gradient, head, end - begin, gradient_of);
    }
    // The target last, over what its thread wrote like any other: no test for it in the loop.
    __syncthreads();
    if (threadIdx.x == 0 && target >= begin && target < end) {
      const S logp = static_cast<const S*>(params.token_logps)[row];
      const S p = exp(logp), of_entropy = p > S(0) ? incoming * p * (logp + entropy) : S(0);
      gradient[target - begin] = Element<G>::narrow(coefficient * -expm1(logp) - of_entropy);
    }
  }
}

template <class T, class G>
int backward(const SeqLogpBackwardParams& params, Stream stream) {
  const int64_t rows = params.rows.rows();
  const int64_t wanted = (kBlocks + rows - 1) / rows;
  const int64_t full = kInFlight * kStep<G>;  // work for every thread of a block
  const int64_t useful = (params.rows.vocab + full - 1) / full;
  const int64_t slices = wanted < useful ? wanted : useful;
  return launch_kernel(backward_kernel<T, G>, rows * slices, kThreads, 0, stream, params, slices,
                       rows * slices);
}

}  // namespace

int seq_logp_backward(const SeqLogpBackwardParams& params, Stream stream) {
  if (params.rows.rows() == 0 || params.rows.vocab == 0) return cudaSuccess;
  if (params.dtype == DType::kFloat32 && params.grad_dtype == DType::kBFloat16) {
    return backward<float, BFloat16>(params, stream);
  }
  if (params.dtype == DType::kFloat32 && params.grad_dtype == DType::kFloat16) {
    return backward<float, Float16>(params, stream);
  }
  if (params.grad_dtype != params.dtype) return cudaErrorInvalidValue;
  return dispatch_dtype(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return backward<T, T>(params, stream);
  });
}

}  // namespace pyfast_dpo::cuda
