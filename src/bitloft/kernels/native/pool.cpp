// Two sources of threads behind one function: the OpenMP runtime that torch has loaded (by its GOMP_parallel, handed
// over as a pointer, so nothing is linked), or a small pool of our own where there is none. A pool of our own beside
// torch's would have both spin on the same cores; docs/decisions.md has the measurement.
#include "pool.hpp"

#include <pthread.h>

#include <mutex>
#include <thread>
#include <vector>

#include "bitloft.h"

namespace bl {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<GompParallel> gomp{nullptr};

constexpr int SPINS = 4000;  // some tens of microseconds: the gap between two products of one layer

class Pool {
 public:
  void run(int threads, Body body, void* context) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return body(context);  // another thread uses the pool: go alone rather than wait
    while (static_cast<int>(started_) < threads - 1) start();
    body_ = body;
    context_ = context;
    wanted_.store(threads - 1, std::memory_order_relaxed);
    running_.store(static_cast<int>(started_), std::memory_order_relaxed);
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    body(context);
    for (int round = 0; running_.load(std::memory_order_acquire) > 0; ++round) relax(round);
  }

 private:
  void start() {
    const uint32_t seen = generation_.load();
    std::thread([this, seen] { work(seen); }).detach();
    ++started_;
  }

  void work(uint32_t seen) {
    for (;;) {
      for (int i = 0; i < SPINS && generation_.load(std::memory_order_acquire) == seen; ++i) relax(0);
      generation_.wait(seen, std::memory_order_acquire);
      seen = generation_.load(std::memory_order_acquire);
      if (wanted_.fetch_sub(1, std::memory_order_relaxed) > 0) body_(context_);
      running_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::mutex turn_;
  size_t started_ = 0;
  Body body_ = nullptr;
  void* context_ = nullptr;
  alignas(64) std::atomic<uint32_t> generation_{0};
  alignas(64) std::atomic<int> wanted_{0};
  alignas(64) std::atomic<int> running_{0};
};

// Never destroyed: detached workers may outlive main. A forked child has no workers and takes a fresh pool.
Pool* pool = nullptr;
std::once_flag once;

Pool& own_pool() {
  std::call_once(once, [] {
    pool = new Pool;
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
  });
  return *pool;
}

}  // namespace

void relax(int round) {
  if (round < SPINS) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  } else {
    std::this_thread::yield();
  }
}

void run_body(int threads, Body body, void* context) {
  if (GompParallel parallel = gomp.load(std::memory_order_relaxed)) {
    parallel(body, context, static_cast<unsigned>(threads), 0);
  } else {
    own_pool().run(threads, body, context);
  }
}

}  // namespace bl

extern "C" void bl_use_openmp(void* gomp_parallel) {
  bl::gomp.store(reinterpret_cast<bl::GompParallel>(gomp_parallel));
}
