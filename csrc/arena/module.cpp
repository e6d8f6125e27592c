// pyfast_dpo.ops._arena: torch's CPU allocator with large tensors in an Arena. An allocator is a
// C++ class of torch's, outside of its stable ABI: this module serves the release of torch it was
// built with, and is not imported by others.
#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <pybind11/pybind11.h>

#include "arena/arena.h"

namespace pyfast_dpo {
namespace {

// Smaller tensors do not move the peak, and are many.
constexpr size_t kLarge = 64 * 1024;

// Tensors outlive the interpreter's end: never destroyed.
Arena& arena() {
  static Arena& it = *new Arena;
  return it;
}

class ArenaAllocator final : public c10::Allocator {
 public:
  static ArenaAllocator& get() {
    static ArenaAllocator& it = *new ArenaAllocator;
    return it;
  }

  c10::DataPtr allocate(size_t bytes) override {
    void* block = bytes < kLarge ? nullptr : arena().allocate(bytes);
    if (block != nullptr) {
      c10::profiledCPUMemoryReporter().New(block, bytes);
    } else {
      block = others_->allocate(bytes).release_context();
    }
    return {block, block, &free, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &free; }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

  // Whether large tensors will lie in the arena.
  bool install() {
    c10::Allocator* current = c10::GetCPUAllocator();
    if (current != this) {
      // A block must be its own context, as here, and blocks of two others would need two deleters.
      const bool fits =
          current->raw_deleter() != nullptr && (others_ == nullptr || others_ == current);
      if (!arena().usable() || !fits) return false;
      others_ = current;
      free_other_ = current->raw_deleter();
      c10::SetCPUAllocator(this);  // not if somebody's has a priority
    }
    const bool installed = c10::GetCPUAllocator() == this;
    arena().keep_pages(installed);
    return installed;
  }

  void uninstall() {
    if (c10::GetCPUAllocator() == this) c10::SetCPUAllocator(others_);
    arena().keep_pages(false);
  }

 private:
  ArenaAllocator() {
    pthread_atfork([] { arena().lock(); }, [] { arena().unlock(); }, [] { arena().unlock(); });
  }

  static void free(void* block) {
    if (arena().contains(block)) {
      c10::profiledCPUMemoryReporter().Delete(block);
      arena().free(block);
    } else {
      get().free_other_(block);
    }
  }

  c10::Allocator* others_ = nullptr;  // serves small tensors, and all when the arena is full
  c10::DeleterFnPtr free_other_ = nullptr;
};

}  // namespace
}  // namespace pyfast_dpo

PYBIND11_MODULE(_arena, m) {
  using pyfast_dpo::ArenaAllocator;
  m.def("install", [] { return ArenaAllocator::get().install(); });
  m.def("uninstall", [] { ArenaAllocator::get().uninstall(); });
}
