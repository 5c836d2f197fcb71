// A work-stealing thread pool for operators of microseconds, on machines that have other work too.
//
// A parallel loop with static shares takes as long as its slowest thread. Beside other processes
// that is a thread that the scheduler has descheduled, for milliseconds: a thousand times as long
// as its share takes. In this pool nothing waits for such a thread:
//   - Work is divided into chunks. A thread computes the chunks of its own share, then steals
//     others.
//   - A thread computes a chunk into memory of its own. When no chunk is left to take, and one that
//     another thread took is overdue, the caller computes it again. The first result is committed,
//     the other dropped. So the caller can always finish alone.
//   - Idle workers spin briefly, since the next operator follows in microseconds, and then sleep:
//     as long as they spin, the scheduler has no idle processor to which it could move the caller.
//   - Workers are kept off the caller's processor. The scheduler does not know that one waits for
//     the other, and where no processor is idle it can leave both on one.
// The result of a chunk is a pure function of its number, whichever thread computes it.

#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

#include "spin.h"

namespace hotloop {

// The work of an operator: units, of which consecutive ones form a chunk.
class Task {
 public:
  virtual ~Task() = default;

  // Computes units begin … end - 1 into `result`. It may run after the operator has returned, when
  // its result is dropped; so the task must own its inputs.
  virtual void compute(int64_t begin, int64_t end, std::byte* result) const = 0;

  // Copies a result to its destination: once for each unit, before the operator returns.
  virtual void commit(int64_t begin, int64_t end, const std::byte* result) const = 0;

  int64_t units;
  int64_t grain_size;  // the fewest units that are worth another thread
  size_t unit_bytes;   // of the result of a unit
};

class Pool {
 public:
  static constexpr int kChunks = 16;  // the most chunks of a share
  static constexpr int kThreads = 256;

  // The pool of the process. It is never destroyed, since its threads run until the process ends. A
  // forked child, which has none of the threads, makes a new pool.
  static Pool& shared() {
    static const int once = [] {
      process_pool_ = new Pool;
      return pthread_atfork(nullptr, nullptr, [] { process_pool_ = new Pool; });
    }();
    static_cast<void>(once);
    return *process_pool_;
  }

  // Computes and commits a task with at most `threads` threads, including the caller.
  void run(std::unique_ptr<Task> task, int threads) noexcept {
    std::unique_lock<std::mutex> lock(mutex_, std::defer_lock);
    const int64_t grains = (task->units + task->grain_size - 1) / task->grain_size;
    threads = int(std::min<int64_t>(threads, grains));
    if (threads > 1 && lock.try_lock()) {
      threads = prepare(threads);
    } else {
      threads = 1;  // too little work, or another caller has the workers
    }
    if (threads == 1) {
      const int64_t length = chunk_length(*task, 1);
      std::byte* const result = scratch(length * task->unit_bytes);
      for (int64_t begin = 0; begin < task->units; begin += length) {
        const int64_t end = std::min(begin + length, task->units);
        task->compute(begin, end, result);
        task->commit(begin, end, result);
      }
      return;
    }
    Region& region = free_region();
    region.open(std::move(task), threads);
    current_.store(&region, std::memory_order_release);
    published_.fetch_add(1, std::memory_order_release);
    for (int worker = 1; worker < threads; worker++) published_.notify_one();
    region.finish();
    region.leave();
    region.clear();
  }

 private:
  using Clock = std::chrono::steady_clock;

  // How long a worker spins before it sleeps: longer than most pauses between two operators.
  static constexpr std::chrono::microseconds kSpinTime{100};

  static int64_t chunk_length(const Task& task, int threads) {
    const int64_t chunks = int64_t(kChunks) * threads;
    return std::max(task.grain_size, (task.units + chunks - 1) / chunks);
  }

  // Scratch memory of the calling thread, aligned to a vector register.
  static std::byte* scratch(size_t bytes) {
    struct alignas(64) Line {
      std::byte bytes[64];
    };
    thread_local std::vector<Line> lines;
    if (lines.size() * sizeof(Line) < bytes) lines.resize(bytes / sizeof(Line) + 1);
    return lines.data()->bytes;
  }

  // A task while threads work on it. A late worker may still be inside when the caller has
  // finished: until it has left, the region is not reused and the task is kept. Only callers delete
  // tasks: freeing a tensor may take Python's lock, for which workers must not wait.
  class Region {
   public:
    void open(std::unique_ptr<Task> task, int threads) {
      task_ = std::move(task);
      threads_ = threads;
      length_ = chunk_length(*task_, threads);
      chunks_ = (task_->units + length_ - 1) / length_;
      arrived_.store(1, std::memory_order_relaxed);  // the caller
      done_.store(0, std::memory_order_relaxed);
      for (int t = 0; t < threads; t++) {
        for (auto& state : shares_[t].chunks) state.store(0, std::memory_order_relaxed);
      }
      inside_.store(1, std::memory_order_release);
    }

    // Returns whether the region is open; if so, its task is kept until leave().
    bool enter() {
      int inside = inside_.load(std::memory_order_relaxed);
      while (inside > 0) {
        if (inside_.compare_exchange_weak(inside, inside + 1, std::memory_order_acquire)) {
          return true;
        }
      }
      return false;
    }

    void leave() { inside_.fetch_sub(1, std::memory_order_release); }

    // Deletes the task if no thread is inside; returns whether the region can be reused.
    bool clear() {
      if (inside_.load(std::memory_order_acquire)) return false;
      task_.reset();
      return true;
    }

    // Runs in a worker that has entered: the first ones to arrive get a share.
    void help() {
      const int self = arrived_.fetch_add(1, std::memory_order_relaxed);
      if (self < threads_) work(self);
    }

    // Computes chunks until none is left to take, its own share first; returns their number.
    int64_t work(int self) {
      std::byte* const result = scratch(length_ * task_->unit_bytes);
      int64_t computed = 0;
      for (int i = 0; i < threads_; i++) {
        const int owner = (self + i) % threads_;
        const int64_t begin = first_of(owner), end = first_of(owner + 1);
        for (int64_t j = 0; j < end - begin; j++) {
          // Steals from the far end of other shares, whose owners begin at the near end.
          const int64_t at = i == 0 ? j : end - begin - 1 - j;
          auto& state = shares_[owner].chunks[at];
          if (state.load(std::memory_order_relaxed)) continue;
          if (state.fetch_or(kTaken, std::memory_order_relaxed)) continue;
          compute(begin + at, state, result);
          computed++;
        }
      }
      return computed;
    }

    // Runs in the caller: computes chunks, waits for others as long as their chunks should take,
    // and then computes those itself.
    void finish() {
      const auto start = Clock::now();
      const int64_t computed = work(0);
      if (ready()) return;
      const auto now = Clock::now();
      const auto overdue = now + (now - start) / std::max<int64_t>(1, computed);
      while (Clock::now() < overdue) {
        if (poll([&] { return ready(); })) return;
      }
      std::byte* const result = scratch(length_ * task_->unit_bytes);
      for (int owner = 0; owner < threads_; owner++) {
        const int64_t begin = first_of(owner), end = first_of(owner + 1);
        for (int64_t at = 0; at < end - begin; at++) {
          auto& state = shares_[owner].chunks[at];
          if (!(state.load(std::memory_order_relaxed) & kCommitted)) {
            compute(begin + at, state, result);
          }
        }
      }
      while (!ready()) std::this_thread::yield();  // a worker is committing
    }

   private:
    static constexpr uint8_t kTaken = 1, kCommitted = 2;

    struct alignas(64) Share {
      std::atomic<uint8_t> chunks[kChunks];
    };

    int64_t first_of(int owner) const { return chunks_ * owner / threads_; }

    bool ready() const { return done_.load(std::memory_order_acquire) == chunks_; }

    void compute(int64_t chunk, std::atomic<uint8_t>& state, std::byte* result) {
      const int64_t begin = chunk * length_, end = std::min(begin + length_, task_->units);
      task_->compute(begin, end, result);
      if (state.fetch_or(kCommitted, std::memory_order_relaxed) & kCommitted) return;
      task_->commit(begin, end, result);
      done_.fetch_add(1, std::memory_order_release);
    }

    alignas(64) std::atomic<int> inside_{0}, arrived_{0};
    std::unique_ptr<Task> task_;
    int threads_ = 0;
    int64_t length_ = 0;  // units of a chunk
    int64_t chunks_ = 0;  // the number of chunks
    alignas(64) std::atomic<int64_t> done_{0};
    Share shares_[kThreads];
  };

  // A region without threads inside. Each worker can be late in one, so one more may be needed.
  Region& free_region() {
    Region* found = nullptr;
    for (const auto& region : regions_) {
      if (region->clear()) found = region.get();
    }
    if (!found) found = regions_.emplace_back(std::make_unique<Region>()).get();
    return *found;
  }

  // Starts missing workers, and keeps all of them off the caller's processor; returns the number of
  // threads to use.
  int prepare(int threads) {
    threads = std::min(threads, kThreads);
#if defined(__linux__)
    const int processor = sched_getcpu();
    if (processor != processor_) keep_off(processor);
    threads = std::min(threads, processors_);
#endif
    while (int(workers_.size()) < threads - 1) {
      try {
        workers_.emplace_back([this] { serve(); });
      } catch (const std::system_error&) {  // the limit of threads is reached
        break;
      }
#if defined(__linux__)
      pthread_setaffinity_np(workers_.back().native_handle(), sizeof others_, &others_);
#endif
    }
    return std::min(threads, int(workers_.size()) + 1);
  }

#if defined(__linux__)
  void keep_off(int processor) {
    processor_ = processor;
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed)) return;
    processors_ = CPU_COUNT(&allowed);
    others_ = allowed;
    if (processors_ > 1) CPU_CLR(processor, &others_);
    for (auto& worker : workers_) {
      pthread_setaffinity_np(worker.native_handle(), sizeof others_, &others_);
    }
  }
#endif

  [[noreturn]] void serve() {
    for (uint32_t seen = 0;;) {
      const auto published = [&] { return published_.load(std::memory_order_acquire) != seen; };
      for (const auto deadline = Clock::now() + kSpinTime; !poll(published);) {
        if (Clock::now() >= deadline) published_.wait(seen);
      }
      seen = published_.load(std::memory_order_acquire);
      Region* const region = current_.load(std::memory_order_acquire);
      if (region->enter()) {
        region->help();
        region->leave();
      }
    }
  }

  inline static Pool* process_pool_ = nullptr;

  std::mutex mutex_;
  std::vector<std::thread> workers_;
  std::vector<std::unique_ptr<Region>> regions_;
  alignas(64) std::atomic<uint32_t> published_{0};  // the number of tasks so far
  std::atomic<Region*> current_{nullptr};
#if defined(__linux__)
  int processor_ = -1;         // the caller's
  int processors_ = kThreads;  // the number that the caller may run on
  cpu_set_t others_{};         // those that workers may run on
#endif
};

}  // namespace hotloop
