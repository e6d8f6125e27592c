// Test memory between two inaccessible pages, so that a kernel that leaves it faults.
#include <sys/mman.h>
#include <unistd.h>

#include <map>

#include "host_cuda.h"

namespace host_cuda {
namespace {

struct Mapping {
  void* base;
  size_t bytes;
};
std::map<void*, Mapping> mappings;

}  // namespace

void* guarded_alloc(size_t bytes, size_t alignment, bool from_start) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t body = (bytes + page - 1) / page * page;
  // NORESERVE: a test of large offsets maps gigabytes and touches a few pages of them.
  void* base =
      mmap(nullptr, body + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) return nullptr;
  char* start = static_cast<char*>(base) + page;
  if (body > 0 && mprotect(start, body, PROT_READ | PROT_WRITE) != 0) {
    munmap(base, body + 2 * page);
    return nullptr;
  }
  void* address = from_start ? start : start + (body - bytes) / alignment * alignment;
  mappings[address] = {base, body + 2 * page};
  return address;
}

void guarded_free(void* address) {
  const auto found = mappings.find(address);
  if (found == mappings.end()) return;
  munmap(found->second.base, found->second.bytes);
  mappings.erase(found);
}

}  // namespace host_cuda
