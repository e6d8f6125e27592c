// Memory for large tensors: one range of addresses, whose free parts are found again whatever lay
// between.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <map>
#include <mutex>
#include <unordered_map>

namespace pyfast_dpo {

// First fit from the low end: over the steps of a training run the range grew to 1.01 to 1.1 times
// the bytes that were in use at its peak, where glibc 2.36 took 1.5 times (its posix_memalign does
// not find a freed block of the same size again, sourceware bug 14581).
class Arena {
 public:
  // As many addresses as the machine has memory; the system adds a page when it is first written.
  Arena() {
    const size_t size = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * page_;
    void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return;  // a limit on addresses, or a system that reserves them all
    begin_ = static_cast<char*>(memory);
    size_ = size;
    free_.emplace(0, size);
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  bool usable() const { return size_ > 0; }

  bool contains(const void* block) const { return block >= begin_ && block < begin_ + size_; }

  // nullptr when no free part is large enough.
  void* allocate(size_t bytes) {
    const size_t size = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto fits = [&](const auto& part) { return part.second >= size; };
    const auto found = std::find_if(free_.begin(), free_.end(), fits);
    if (found == free_.end()) return nullptr;
    const auto [offset, available] = *found;
    const auto next = free_.erase(found);
    if (available > size) free_.emplace_hint(next, offset + size, available - size);
    used_.emplace(offset, size);
    return begin_ + offset;
  }

  void free(void* block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = used_.find(static_cast<size_t>(static_cast<char*>(block) - begin_));
    const auto [freed, freed_size] = *found;
    used_.erase(found);
    size_t first = freed, last = freed + freed_size;
    auto next = free_.lower_bound(freed);
    if (next != free_.end() && next->first == last) {
      last += next->second;
      next = free_.erase(next);
    }
    if (next != free_.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second == freed) {
        first = before->first;
        next = free_.erase(before);
      }
    }
    free_.emplace_hint(next, first, last - first);
    if (!keeps_pages_) {
      give_back(std::max(first, freed / page_ * page_),
                std::min(last, (freed + freed_size + page_ - 1) / page_ * page_));
    }
  }

  // Whether the pages of free parts stay with the process; if not, the system has them back.
  void keep_pages(bool keep) {
    const std::lock_guard<std::mutex> lock(mutex_);
    keeps_pages_ = keep;
    if (keep) return;
    for (const auto& [offset, size] : free_) give_back(offset, offset + size);
  }

  // Around fork, so that no other thread has the lock in the child for ever.
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  static constexpr size_t kAlignment = 64;  // torch's, and a cache line

  // The pages that lie between first and last as a whole.
  void give_back(size_t first, size_t last) {
    first = (first + page_ - 1) / page_ * page_;
    last = last / page_ * page_;
    if (first < last) madvise(begin_ + first, last - first, MADV_DONTNEED);
  }

  const size_t page_ = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  char* begin_ = nullptr;
  size_t size_ = 0;
  bool keeps_pages_ = false;
  std::mutex mutex_;
  std::map<size_t, size_t> free_;            // offset -> size; neighbours are one part
  std::unordered_map<size_t, size_t> used_;  // offset -> size
};

}  // namespace pyfast_dpo
