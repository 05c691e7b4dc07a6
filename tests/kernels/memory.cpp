#include "memory.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#ifndef __SANITIZE_ADDRESS__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace manyheads {

#ifdef __SANITIZE_ADDRESS__

void* take_exactly(size_t bytes, size_t alignment) {
  void* data = nullptr;
  if (posix_memalign(&data, alignment < sizeof(void*) ? sizeof(void*) : alignment, bytes) != 0)
    throw std::bad_alloc();
  return data;
}

void give_back(void* data, size_t) { std::free(data); }

#else

namespace {

size_t page() { return size_t(sysconf(_SC_PAGESIZE)); }
size_t whole_pages(size_t bytes) { return (bytes + page() - 1) / page() * page(); }

}  // namespace

void* take_exactly(size_t bytes, size_t alignment) {
  if (bytes % alignment != 0) {
    std::fprintf(stderr, "an array of %zu bytes cannot end at a page aligned to %zu\n", bytes,
                 alignment);
    std::abort();
  }
  const size_t room = whole_pages(bytes);
  void* const memory =
      mmap(nullptr, room + page(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  char* const end = static_cast<char*>(memory) + room;
  if (mprotect(end, page(), PROT_NONE) != 0) throw std::bad_alloc();
  return end - bytes;
}

void give_back(void* data, size_t bytes) {
  const size_t room = whole_pages(bytes);
  munmap(static_cast<char*>(data) + bytes - room, room + page());
}

#endif

namespace {

constexpr uint32_t kUntouched = 0x7fc5a5a5;

}  // namespace

void wipe(void* data, int64_t bytes) {
  for (int64_t i = 0; i + 4 <= bytes; i += 4)
    std::memcpy(static_cast<char*>(data) + i, &kUntouched, 4);
}

bool untouched(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits == kUntouched;
}

}  // namespace manyheads
