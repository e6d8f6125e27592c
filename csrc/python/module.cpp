// pyfast_dpo.ops._C: build facts, CPU capability, loss names, the scalar losses, and the NumPy
// entry points. Importing it also runs the operator registrations of csrc/torch. No tensor crosses
// pybind11.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/losses.h"
#include "cpu/kernels.h"
#include "cuda/launch.h"
#include "torch/cpu_driver.h"

namespace py = pybind11;

namespace pyfast_dpo {
namespace {

#define PFD_STRINGIZE_VALUE(x) #x
#define PFD_STRINGIZE(x) PFD_STRINGIZE_VALUE(x)

template <class List>
std::vector<std::string> names() {
  return {List::kNames, List::kNames + List::kCount};
}

template <class List>
int index_of(const std::string& name) {
  const int index = List::index_of(name.c_str());
  if (index < 0) throw py::value_error("unknown loss " + name);
  return index;
}

// Empty when PYFAST_DPO_CPU_CAPABILITY names nothing that is available.
std::string cpu_capability() {
  const cpu::Kernels* table = cpu::kernels();
  return table == nullptr ? "" : table->name;
}

py::dict build_facts() {
  py::dict facts;
  facts["torch_at_build"] = PFD_STRINGIZE(PFD_TORCH_VERSION);
#if defined(__clang__)
  facts["compiler"] = __VERSION__;  // names itself
#else
  facts["compiler"] = "gcc " __VERSION__;
#endif
  facts["cpu_kernels"] = std::vector<std::string>{
      cpu::kGenericKernels.name,
#if defined(__x86_64__)
      cpu::kAvx2Kernels.name,       cpu::kAvx512Kernels.name,
      cpu::kAvx512Bf16Kernels.name, cpu::kAmxKernels.name,
#endif
  };
  facts["cuda"] = cuda::is_built();
  facts["cuda_architectures"] = cuda::built_architectures();
  facts["cuda_runtime"] = cuda::runtime_version();
  return facts;
}

DType array_dtype(const py::array& array) {
  const std::string format = py::str(array.dtype().attr("name"));
  if (format == "float64") return DType::kFloat64;
  if (format == "float32") return DType::kFloat32;
  if (format == "float16") return DType::kFloat16;
  throw py::type_error("sequence_logps: logits must be float64, float32 or float16, got " + format);
}

// Kernels read whole elements, and numpy's contiguous arrays may lie anywhere.
void check_aligned(const char* what, const py::array& array) {
  if ((array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_) == 0) {
    throw py::value_error(std::string(what) + " must be aligned");
  }
}

py::array new_stats(DType dtype, std::vector<py::ssize_t> shape) {
  return py::array(py::dtype(dtype == DType::kFloat64 ? "float64" : "float32"), std::move(shape));
}

// logits [B, T, V] with a contiguous last dimension, labels [B, T] int64 (-100 ignored), both
// checked by pyfast_dpo/numpy.py -> sequence log-probs [B]
py::array sequence_logps(const py::array& logits, py::array_t<int64_t, py::array::c_style> labels) {
  const DType dtype = array_dtype(logits);
  const bool native = logits.dtype().attr("isnative").cast<bool>();
  if (!native) throw py::value_error("sequence_logps: logits must be of native byte order");
  check_aligned("sequence_logps: logits and labels", logits);
  check_aligned("sequence_logps: logits and labels", labels);
  if (logits.ndim() != 3 || logits.shape(2) == 0 || labels.ndim() != 2 ||
      labels.shape(0) != logits.shape(0) || labels.shape(1) != logits.shape(1) ||
      (logits.size() > 0 && logits.shape(2) > 1 && logits.strides(2) != logits.itemsize())) {
    throw py::value_error(
        "sequence_logps: logits must be [B, T, V] with contiguous rows and labels [B, T]");
  }
  const py::ssize_t batch = logits.shape(0), length = logits.shape(1);
  py::array logps = new_stats(dtype, {batch}), scale = new_stats(dtype, {batch});
  py::array tokens = new_stats(dtype, {batch, length});
  py::array row_max = new_stats(dtype, {batch, length}),
            row_sum = new_stats(dtype, {batch, length});
  SeqLogpParams params{};
  params.logits = logits.data();
  params.batch_stride = logits.strides(0) / logits.itemsize();
  params.row_stride = logits.strides(1) / logits.itemsize();
  params.dtype = dtype;
  params.rows = {labels.data(), batch, length, logits.shape(2), -100, false};
  params.sequence_logps = logps.mutable_data();
  params.sequence_scale = scale.mutable_data();
  params.token_logps = tokens.mutable_data();
  params.row_max = row_max.mutable_data();
  params.row_sum = row_sum.mutable_data();
  {
    const py::gil_scoped_release release;
    seq_logp_forward_cpu(params);
  }
  return logps;
}

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
const T* data_or_null(const std::optional<Array<T>>& array, py::ssize_t size) {
  if (!array.has_value()) return nullptr;
  if (array->size() != size) throw py::value_error("arrays must have equal lengths");
  check_aligned("arrays", *array);
  return array->data();
}

Divergence divergence_of(const std::string& name) {
  if (name == "reverse_kl") return Divergence::kReverseKl;
  if (name == "js_divergence") return Divergence::kJensenShannon;
  if (name == "alpha_divergence") return Divergence::kAlpha;
  throw py::value_error("unknown divergence " + name);
}

// -> losses, chosen_rewards, rejected_rewards, d losses / d chosen, d losses / d rejected, all [P]
template <class T>
py::tuple pair_loss(const Array<T>& policy_chosen, const Array<T>& policy_rejected,
                    const std::optional<Array<T>>& reference_chosen,
                    const std::optional<Array<T>>& reference_rejected,
                    const std::optional<Array<T>>& chosen_lengths,
                    const std::optional<Array<T>>& rejected_lengths,
                    const std::optional<Array<T>>& margins, const std::optional<Array<T>>& shift,
                    const std::string& loss, double beta, double label_smoothing,
                    double discopop_tau, double margin, const std::string& divergence,
                    double divergence_alpha, bool average_first) {
  const py::ssize_t pairs = policy_chosen.size();
  if (policy_rejected.size() != pairs) throw py::value_error("arrays must have equal lengths");
  check_aligned("arrays", policy_chosen);
  check_aligned("arrays", policy_rejected);
  Array<T> losses(pairs), chosen_rewards(pairs), rejected_rewards(pairs), d_chosen(pairs),
      d_rejected(pairs);
  const std::vector<T> ones(static_cast<size_t>(pairs), T(1));
  PairLossParams params{};
  params.dtype = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;
  params.loss = index_of<PairLosses>(loss);
  params.pairs = pairs;
  params.params.beta = beta;
  params.params.label_smoothing = label_smoothing;
  params.params.discopop_tau = discopop_tau;
  params.margin = margin;
  params.divergence = divergence_of(divergence);
  params.divergence_alpha = divergence_alpha;
  params.average_first = average_first;
  params.policy_chosen = policy_chosen.data();
  params.policy_rejected = policy_rejected.data();
  params.reference_chosen = data_or_null(reference_chosen, pairs);
  params.reference_rejected = data_or_null(reference_rejected, pairs);
  params.chosen_lengths = data_or_null(chosen_lengths, pairs);
  params.rejected_lengths = data_or_null(rejected_lengths, pairs);
  params.margins = data_or_null(margins, pairs);
  params.shift = data_or_null(shift, 1);
  params.grad_losses = ones.data();
  params.losses = losses.mutable_data();
  params.chosen_rewards = chosen_rewards.mutable_data();
  params.rejected_rewards = rejected_rewards.mutable_data();
  params.grad_chosen = d_chosen.mutable_data();
  params.grad_rejected = d_rejected.mutable_data();
  cpu::pair_loss_forward(params);
  cpu::pair_loss_backward(params);
  return py::make_tuple(losses, chosen_rewards, rejected_rewards, d_chosen, d_rejected);
}

// -> losses, rewards, d losses / d policy, all [N]
template <class T>
py::tuple unpaired_loss(const Array<T>& policy, const std::optional<Array<T>>& reference,
                        const Array<bool>& is_desirable, double kl, const std::string& loss,
                        double beta, double desirable_weight, double undesirable_weight) {
  const py::ssize_t count = policy.size();
  if (is_desirable.size() != count) throw py::value_error("arrays must have equal lengths");
  check_aligned("arrays", policy);
  Array<T> losses(count), rewards(count), d_policy(count);
  const std::vector<T> ones(static_cast<size_t>(count), T(1));
  const T kl_value = static_cast<T>(kl);
  UnpairedLossParams params{};
  params.dtype = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;
  params.loss = index_of<UnpairedLosses>(loss);
  params.count = count;
  params.params.beta = beta;
  params.params.desirable_weight = desirable_weight;
  params.params.undesirable_weight = undesirable_weight;
  params.policy = policy.data();
  params.reference = data_or_null(reference, count);
  params.is_desirable = is_desirable.data();
  params.kl = &kl_value;
  params.grad_losses = ones.data();
  params.losses = losses.mutable_data();
  params.rewards = rewards.mutable_data();
  params.grad_policy = d_policy.mutable_data();
  cpu::unpaired_loss_forward(params);
  cpu::unpaired_loss_backward(params);
  return py::make_tuple(losses, rewards, d_policy);
}

// PPO's clipped loss of tokens -> losses [N], d losses / d logps [N]
template <class T>
py::tuple ppo_loss(const Array<T>& logps, const Array<T>& old, const Array<T>& advantages,
                   double epsilon) {
  const py::ssize_t count = logps.size();
  if (old.size() != count || advantages.size() != count) {
    throw py::value_error("arrays must have equal lengths");
  }
  Array<T> losses(count), gradient(count);
  std::vector<T> kl(static_cast<size_t>(count)), ratios(static_cast<size_t>(count));
  std::vector<int8_t> clipped(static_cast<size_t>(count));
  const int64_t offsets[2] = {0, count};
  T total = 0;
  PolicyLossParams params{};
  params.dtype = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;
  params.loss = index_of<PolicyLosses>(Clip::name);
  params.tokens = count;
  params.sequences = 1;
  params.options.epsilon = params.options.epsilon_high = epsilon;
  params.options.delta = std::numeric_limits<double>::infinity();
  params.advantage_per_token = true;
  params.logps = logps.data();
  params.old = old.data();
  params.advantages = advantages.data();
  params.offsets = offsets;
  params.sequence_losses = &total;
  params.token_losses = losses.mutable_data();
  params.coefficients = gradient.mutable_data();
  params.kl = kl.data();
  params.ratios = ratios.data();
  params.clipped = clipped.data();
  cpu::policy_loss(params);
  return py::make_tuple(losses, gradient);
}

// Advantages [T] of consecutive steps.
Array<double> gae(const Array<double>& rewards, const Array<double>& values,
                  const Array<bool>& dones, double last_value, double gamma, double lam) {
  const py::ssize_t count = rewards.size();
  if (values.size() != count || dones.size() != count) {
    throw py::value_error("arrays must have equal lengths");
  }
  Array<double> advantages(count);
  GaeParams params{};
  params.dtype = DType::kFloat64;
  params.batch = 1;
  params.length = count;
  params.gamma = gamma;
  params.lam = lam;
  params.rewards = rewards.data();
  params.values = values.data();
  params.last_values = &last_value;
  params.dones = dones.data();
  params.advantages = advantages.mutable_data();
  cpu::gae(params);
  return advantages;
}

}  // namespace
}  // namespace pyfast_dpo

PYBIND11_MODULE(_C, m) {
  using namespace pyfast_dpo;
  m.def("build_facts", &build_facts);
  m.def("cpu_capability", &cpu_capability);
  m.def("best_cpu_capability", &cpu::best_capability);
  m.def("cpu_vendor", &cpu::vendor);
  m.def("head_panel_rows",
        [] { return cpu::kernels() == nullptr ? 1 : cpu::kernels()->gemm.rows; });
  m.def("pair_loss_names", &names<PairLosses>);
  m.def("unpaired_loss_names", &names<UnpairedLosses>);
  m.def("policy_loss_names", &names<PolicyLosses>);
  m.def("sequence_logps", &sequence_logps);
  // noconvert: float32 arrays take the float32 overload, and nothing is cast behind the caller's
  // back.
  m.def("pair_loss", &pair_loss<float>, py::arg().noconvert(), py::arg().noconvert(),
        py::arg().noconvert(), py::arg().noconvert(), py::arg().noconvert(), py::arg().noconvert(),
        py::arg().noconvert(), py::arg().noconvert(), py::arg(), py::arg(), py::arg(), py::arg(),
        py::arg(), py::arg(), py::arg(), py::arg());
  m.def("pair_loss", &pair_loss<double>, py::arg().noconvert(), py::arg().noconvert(),
        py::arg().noconvert(), py::arg().noconvert(), py::arg().noconvert(), py::arg().noconvert(),
        py::arg().noconvert(), py::arg().noconvert(), py::arg(), py::arg(), py::arg(), py::arg(),
        py::arg(), py::arg(), py::arg(), py::arg());
  m.def("unpaired_loss", &unpaired_loss<float>, py::arg().noconvert(), py::arg().noconvert(),
        py::arg().noconvert(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg());
  m.def("unpaired_loss", &unpaired_loss<double>, py::arg().noconvert(), py::arg().noconvert(),
        py::arg().noconvert(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg());
  m.def("ppo_loss", &ppo_loss<float>, py::arg().noconvert(), py::arg().noconvert(),
        py::arg().noconvert(), py::arg());
  m.def("ppo_loss", &ppo_loss<double>, py::arg().noconvert(), py::arg().noconvert(),
        py::arg().noconvert(), py::arg());
  m.def("gae", &gae);
}
