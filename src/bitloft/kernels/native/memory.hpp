// Memory of a thread that only grows: an allocation of a call's size costs as much as a small product.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace bl {

class Memory {
 public:
  // At least `bytes`, on a cache line; what was there before may be lost.
  void* get(int64_t bytes) {
    if (bytes > size_) {
      held_.reset(static_cast<char*>(::operator new(static_cast<size_t>(bytes), std::align_val_t{64})));
      size_ = bytes;
    }
    return held_.get();
  }

 private:
  struct Free {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  std::unique_ptr<char, Free> held_;
  int64_t size_ = 0;
};

}  // namespace bl
