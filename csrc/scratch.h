// Memory that a thread keeps between calls: fresh pages of a few megabytes would cost each call more than some kernels do.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace snapgen {

class Scratch {
 public:
  ~Scratch() { std::free(memory_); }
  // At least `bytes` bytes, aligned to 64, with whatever was in them; valid until this thread's next call.
  void* get(int64_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      size_ = 0;
      memory_ = std::malloc(size_t(bytes) + 64);
      if (!memory_) throw std::bad_alloc();
      size_ = bytes;
    }
    char* start = static_cast<char*>(memory_);
    return start + (64 - reinterpret_cast<uintptr_t>(start) % 64);
  }

 private:
  void* memory_ = nullptr;
  int64_t size_ = 0;
};

inline Scratch& thread_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

}  // namespace snapgen
