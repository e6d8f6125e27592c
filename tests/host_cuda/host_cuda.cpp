// The scheduler of the stand-in. A launch fails, with a message, when
//   - a thread reads or writes outside memory it may touch (guarded_alloc), or a vector off its
//   alignment;
//   - a barrier is not reached by all threads of a block, or threads wait at different barriers;
//   - the lanes of a warp do not all take part in a shuffle or vote, or not in the same one;
//   - shared memory is written past the size of the launch.
// Shared memory is NaN when a block starts, and the order of threads can be varied, so that a
// kernel that reads what no barrier has made visible gives other results.
#include "host_cuda.h"

#include <cuda_runtime.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "fiber.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace pyfast_dpo::cuda {
constexpr size_t kSharedBytes = 16 * 1024;
alignas(4096) unsigned char block_scratch[kSharedBytes];  // `extern __shared__` of csrc/cuda
}  // namespace pyfast_dpo::cuda

namespace host_cuda {
namespace {

using pyfast_dpo::cuda::block_scratch;
using pyfast_dpo::cuda::kSharedBytes;

constexpr int kMaxThreads = 1024, kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;
constexpr unsigned char kPoison = 0xff;  // a NaN in every floating-point type

struct Thread {
  Context context;
  bool done = true;
  bool at_barrier = false, at_exchange = false;  // what it waits for
  const char* file = nullptr;
  int line = 0;
};

// Lanes meet twice as often as they may overtake one another, so two sets of slots are enough.
struct Warp {
  uint64_t slots[2][kWarp];
  Collective kind = Collective::kNone;
  int arrived = 0;
  unsigned turn = 0;
};

struct Launch {
  Context scheduler;
  std::vector<Thread> threads{kMaxThreads};
  Warp warps[kMaxThreads / kWarp];
  char* stacks = nullptr;
  const std::function<void()>* kernel = nullptr;
  int current = 0, count = 0;
  bool failed = false;
  char message[512] = "";
  Order order = Order::kForward;
  std::mt19937_64 random;
  sigjmp_buf fault;
  std::string skipped_file;
  int skipped_line = 0;
  std::set<const void*> launched;
};
Launch state;

void fail(const char* format, ...) {
  if (state.failed) return;  // the first message is the cause
  state.failed = true;
  va_list arguments;
  va_start(arguments, format);
  const int used = vsnprintf(state.message, sizeof(state.message), format, arguments);
  va_end(arguments);
  snprintf(state.message + used, sizeof(state.message) - used, " (block %u, thread %d)", blockIdx.x,
           state.current);
}

void to_scheduler() { switch_context(state.threads[state.current].context, state.scheduler); }

void run_thread() {
  (*state.kernel)();
  state.threads[state.current].done = true;
  to_scheduler();
}

void resume(int index) {
  state.current = index;
  threadIdx = {static_cast<unsigned>(index), 0, 0};
  switch_context(state.scheduler, state.threads[index].context);
}

void release_barrier() {
  const Thread& first = state.threads[0];
  for (int i = 0; i < state.count; ++i) {
    Thread& thread = state.threads[i];
    if (thread.line != first.line || strcmp(thread.file, first.file) != 0) {
      state.current = i;
      return fail("threads wait at different barriers, %s:%d and %s:%d", first.file, first.line,
                  thread.file, thread.line);
    }
    thread.at_barrier = false;
  }
}

// The order of this round: warps stay together, their order and that of their lanes is chosen.
void order_threads(std::vector<int>& order) {
  std::iota(order.begin(), order.end(), 0);
  if (state.order == Order::kReverse) std::reverse(order.begin(), order.end());
  if (state.order != Order::kShuffled) return;
  std::vector<int> warps(order.size() / kWarp);
  std::iota(warps.begin(), warps.end(), 0);
  std::shuffle(warps.begin(), warps.end(), state.random);
  auto next = order.begin();
  for (const int warp : warps) {
    std::iota(next, next + kWarp, warp * kWarp);
    std::shuffle(next, next + kWarp, state.random);
    next += kWarp;
  }
}

// Runs one warp as far as it can go without the others. So warps drift as far apart as barriers let
// them.
void run_warp(const int* threads) {
  for (bool progress = true; progress && !state.failed;) {
    progress = false;
    for (int i = 0; i < kWarp && !state.failed; ++i) {
      const Thread& thread = state.threads[threads[i]];
      if (thread.done || thread.at_barrier || thread.at_exchange) continue;
      resume(threads[i]);
      progress = true;
    }
  }
}

// Rounds from barrier to barrier, until all threads are done.
void run_block() {
  std::vector<int> order(state.count);
  for (;;) {
    order_threads(order);
    for (int i = 0; i < state.count; i += kWarp) {
      run_warp(&order[i]);
      if (state.failed) return;
    }
    int done = 0, at_barrier = 0;
    for (int i = 0; i < state.count; ++i) {
      done += state.threads[i].done;
      at_barrier += state.threads[i].at_barrier;
    }
    if (done == state.count) return;
    if (at_barrier + done < state.count) {
      return fail("deadlock: a shuffle or vote is not reached by all lanes of its warp");
    }
    if (done > 0) {
      return fail("deadlock: %d of %d threads wait at a barrier, %d have ended", at_barrier,
                  state.count, done);
    }
    release_barrier();
    if (state.failed) return;
  }
}

void start_block() {
  memset(block_scratch, kPoison, kSharedBytes);
  for (int i = 0; i < state.count; ++i) {
    state.threads[i] = Thread{};
    state.threads[i].done = false;
    make_context(state.threads[i].context, state.stacks + i * kStackBytes, kStackBytes, run_thread);
  }
  for (Warp& warp : state.warps) warp = Warp{};
}

void check_shared(size_t bytes) {
  for (size_t i = bytes; i < kSharedBytes; ++i) {
    if (block_scratch[i] != kPoison) {
      return fail("shared memory written at byte %zu, the launch has %zu", i, bytes);
    }
  }
}

void on_fault(int signal, siginfo_t* info, void*) {
  fail("%s at address %p", signal == SIGSEGV ? "access outside its memory" : "misaligned vector",
       info->si_addr);
  siglongjmp(state.fault, 1);
}

// Turns faults of a launch into an error; whoever handled them before does so again afterwards.
class FaultHandler {
 public:
  FaultHandler() {
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO;
    for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &action, &before_[i]);
  }
  ~FaultHandler() {
    for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &before_[i], nullptr);
  }

 private:
  static constexpr int kSignals[] = {SIGSEGV, SIGILL, SIGTRAP};
  struct sigaction before_[3];
};

}  // namespace

const char* last_message() { return state.message; }

void set_order(Order order, uint64_t seed) {
  state.order = order;
  state.random.seed(seed);
}

void skip_barrier(const char* file_suffix, int line) {
  state.skipped_file = file_suffix;
  state.skipped_line = line;
}

size_t launched_kernels(const void** kernels, size_t capacity) {
  size_t count = 0;
  for (const void* kernel : state.launched) {
    if (count < capacity) kernels[count++] = kernel;
  }
  return count;
}

void record_launch(const void* kernel) { state.launched.insert(kernel); }

cudaError_t launch(dim3 grid, dim3 block, size_t shared_bytes,
                   const std::function<void()>& kernel) {
  state.failed = false;
  state.message[0] = '\0';
  if (block.x == 0 || block.x > kMaxThreads || block.x % kWarp || block.y != 1 || block.z != 1 ||
      grid.x == 0 || grid.x > 0x7fffffffu || grid.y != 1 || grid.z != 1 ||
      shared_bytes > kSharedBytes) {
    fail("launch of %u x %u x %u blocks of %u threads with %zu bytes of shared memory", grid.x,
         grid.y, grid.z, block.x, shared_bytes);
    return cudaErrorInvalidConfiguration;
  }
  if (state.stacks == nullptr) {
    state.stacks =
        static_cast<char*>(mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  }
  state.kernel = &kernel;
  state.count = static_cast<int>(block.x);
  gridDim = grid;
  blockDim = block;
  const FaultHandler handler;
  if (sigsetjmp(state.fault, 1)) return cudaErrorIllegalAddress;
  for (unsigned i = 0; i < grid.x && !state.failed; ++i) {
    blockIdx = {i, 0, 0};
    start_block();
    run_block();
    if (!state.failed) check_shared(shared_bytes);
  }
  return state.failed ? cudaErrorLaunchFailure : cudaSuccess;
}

int lane() { return state.current % kWarp; }

void barrier(const char* file, int line) {
  if (line == state.skipped_line) {
    const std::string_view path(file), suffix(state.skipped_file);
    if (path.size() >= suffix.size() && path.substr(path.size() - suffix.size()) == suffix) return;
  }
  Thread& thread = state.threads[state.current];
  thread.at_barrier = true;
  thread.file = file;
  thread.line = line;
  to_scheduler();
}

uint64_t exchange(Collective kind, unsigned mask, uint64_t value, int source) {
  const int first = state.current / kWarp * kWarp;
  Warp& warp = state.warps[state.current / kWarp];
  const unsigned turn = warp.turn % 2;
  if (mask != 0xffffffffu || (warp.arrived > 0 && warp.kind != kind)) {
    fail(mask != 0xffffffffu ? "only whole warps shuffle here: mask %#x"
                             : "lanes of a warp meet in different shuffles or votes",
         mask);
    to_scheduler();
  }
  warp.kind = kind;
  warp.slots[turn][lane()] = value;
  if (++warp.arrived == kWarp) {
    warp.arrived = 0;
    ++warp.turn;
    for (int i = first; i < first + kWarp; ++i) state.threads[i].at_exchange = false;
  } else {
    state.threads[state.current].at_exchange = true;
    to_scheduler();
  }
  return warp.slots[turn][source];
}

unsigned ballot(unsigned mask, bool vote) {
  Warp& warp = state.warps[state.current / kWarp];
  const unsigned turn = warp.turn % 2;
  exchange(Collective::kBallot, mask, vote, lane());
  unsigned votes = 0;
  for (int i = 0; i < kWarp; ++i) votes |= static_cast<unsigned>(warp.slots[turn][i]) << i;
  return votes;
}

}  // namespace host_cuda
