// Coroutines with stacks of their own: switched by hand on x86-64 (about 5 ns), by ucontext
// elsewhere (two system calls a switch, 100 times slower, same behaviour).
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace host_cuda {

#if defined(__x86_64__)

struct Context {
  void* stack_pointer = nullptr;
};

// Saves the callee-saved registers and the stack pointer of one side, restores the other's.
extern "C" void host_cuda_switch(Context* from, const Context* to);
asm(R"(
  .text
  .globl host_cuda_switch
  .hidden host_cuda_switch
  .type host_cuda_switch, @function
host_cuda_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size host_cuda_switch, .-host_cuda_switch
)");

inline void switch_context(Context& from, const Context& to) { host_cuda_switch(&from, &to); }

// `entry` never returns: it switches away for the last time.
inline void make_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  uintptr_t top = reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15};
  void** slots = reinterpret_cast<void**>(top);
  *--slots = nullptr;  // as if called: the stack is 8 off a multiple of 16 at entry
  *--slots = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--slots = nullptr;
  context.stack_pointer = slots;
}

#else

struct Context {
  ucontext_t state;
};

inline void switch_context(Context& from, const Context& to) {
  swapcontext(&from.state, &to.state);
}

inline void make_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack;
  context.state.uc_stack.ss_size = bytes;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}

#endif

}  // namespace host_cuda
