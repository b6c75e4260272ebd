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

// The same for chunks that lie one after the other in memory: each thread takes those of a stretch of its own, in order, so
// that what it fetches ahead is what it reads next; who is done helps the others.
class Ranges {
 public:
  Ranges(int64_t count, int threads) : count_(count), stretches_(threads < 1 ? 1 : threads < MOST ? threads : MOST) {}

  // The stretch of the calling thread; its first chunk.
  int64_t arrive() { return arrived_.fetch_add(1, std::memory_order_relaxed) % stretches_; }
  int64_t first(int64_t stretch) const { return count_ * stretch / stretches_; }

  template <class F>
  void share(int64_t own, F&& work) {
    int64_t done = 0;
    for (int64_t n = 0; n < stretches_; ++n) {
      const int64_t stretch = (own + n) % stretches_;
      const int64_t begin = first(stretch), end = first(stretch + 1);
      for (int64_t i; (i = begin + taken_[stretch].count.fetch_add(1, std::memory_order_relaxed)) < end;) {
        work(i);
        ++done;
      }
    }
    done_.fetch_add(done, std::memory_order_release);
    for (int round = 0; done_.load(std::memory_order_acquire) < count_; ++round) relax(round);
  }

 private:
  static constexpr int64_t MOST = 16;
  struct alignas(64) Taken {
    std::atomic<int64_t> count{0};
  };

  const int64_t count_, stretches_;
  Taken taken_[MOST];
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<int64_t> done_{0};
};

}  // namespace bl
