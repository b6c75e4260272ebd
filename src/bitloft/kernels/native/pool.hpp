// Threads: run a body on several of them, and share out numbered chunks among whoever is there.
//
//   Stage prepare, multiply;
//   run(threads, [&] {
//     prepare.share(chunks, [&](int64_t i) { ... });   // returns when all chunks are done, by whomever
//     multiply.share(blocks, [&](int64_t i) { ... });
//   });
//
// A stage waits for chunks, not for threads: it is right with any number of them, even if the runtime gives fewer than
// asked. What a chunk computes must not depend on who computes it.
#pragma once

#include <atomic>
#include <cstdint>

namespace bl {

using Body = void (*)(void*);

void run_body(int threads, Body body, void* context);
void relax(int round);  // one step of a spin: pauses, then yields

template <class F>
void run(int threads, F&& body) {
  if (threads <= 1) {
    body();
  } else {
    run_body(threads, [](void* context) { (*static_cast<F*>(context))(); }, const_cast<void*>(static_cast<const void*>(&body)));
  }
}

class Stage {
 public:
  template <class F>
  void share(int64_t count, F&& work) {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count;) {
      work(i);
      done_.fetch_add(1, std::memory_order_release);
    }
    for (int round = 0; done_.load(std::memory_order_acquire) < count; ++round) relax(round);
  }

 private:
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int64_t> done_{0};
};

}  // namespace bl
