// Exchanges among the ranks of one machine, through memory that all of them map.
//
// The activations of a token are about a kilobyte. Two processors exchange them in a microsecond; a
// socket would take a thousand times as long, for system calls and for waking threads.
//   - Each rank has two slots and a counter of the messages that it has posted, which only this
//     rank writes. In an exchange each rank posts its message, and then reads the messages of all
//     ranks. Slots alternate: a rank that posts message n + 2 has read all messages n + 1, and each
//     of these was posted after its rank had read the messages n. So no acknowledgment is needed.
//   - A rank that waits spins first, since the other rank usually posts within microseconds. After
//     kSpinTime it sleeps (a futex) until the message is posted. It sleeps at once if the other rank
//     last ran on the same processor, because spinning would keep that rank from running. This
//     happens with more ranks than processors, or with pinned ranks.
// A rank that waits for a rank that has died sleeps until it is killed (parallel.launch).

#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__linux__)
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <thread>
#endif

#include "spin.h"

namespace hotloop {

// The exchanges of one rank. All state is in the shared memory, which is initially zeros.
class Exchange {
 public:
  static constexpr size_t kMaxBytes = 1 << 16;  // of a message

  static constexpr size_t memory_bytes(int ranks) {
    return ranks * (sizeof(Rank) + 2 * kMaxBytes);
  }

  Exchange(std::byte* memory, int rank, int ranks)
      : ranks_(reinterpret_cast<Rank*>(memory)),
        slots_(memory + ranks * sizeof(Rank)),
        rank_(rank),
        n_ranks_(ranks) {}

  // Posts a message of this rank. When it returns, message_of() has the messages of all ranks, until
  // the next call. Returns false if messages differ in length, which is an error of the caller.
  bool post(const std::byte* message, size_t bytes) {
    Rank& mine = ranks_[rank_];
    number_ = mine.posted.load(std::memory_order_relaxed) + 1;
    std::memcpy(slot(rank_), message, bytes);
    mine.bytes[number_ % 2] = uint32_t(bytes);
    mine.processor.store(processor(), std::memory_order_relaxed);
    // Either this rank sees the sleeper, or the sleeper sees the message.
    mine.posted.store(number_, std::memory_order_seq_cst);
    if (mine.sleepers.load(std::memory_order_seq_cst)) wake(mine.posted);
    bool same_length = true;
    for (int rank = 0; rank < n_ranks_; rank++) {
      if (rank != rank_) wait(ranks_[rank]);
      same_length = same_length && ranks_[rank].bytes[number_ % 2] == bytes;
    }
    return same_length;
  }

  const std::byte* message_of(int rank) const { return slot(rank); }

 private:
  using Clock = std::chrono::steady_clock;

  // How long a rank spins before it sleeps: more than the difference between the ranks' computation
  // times in most steps.
  static constexpr std::chrono::microseconds kSpinTime{200};

  struct alignas(64) Rank {
    std::atomic<uint32_t> posted;    // the number of messages so far
    std::atomic<uint32_t> sleepers;  // the number of ranks that sleep until `posted` changes
    std::atomic<int32_t> processor;  // on which this rank posted its last message
    uint32_t bytes[2];               // lengths of the messages in its slots
  };
  static_assert(std::atomic<uint32_t>::is_always_lock_free, "other processes have no such lock");

  std::byte* slot(int rank) const { return slots_ + (2 * rank + number_ % 2) * kMaxBytes; }

  bool has_posted(const Rank& other) const {
    // Compares by the difference, since numbers wrap around.
    return int32_t(other.posted.load(std::memory_order_seq_cst) - number_) >= 0;
  }

  void wait(Rank& other) const {
    const auto posted = [&] { return has_posted(other); };
    if (posted()) return;
    const auto deadline = Clock::now() + kSpinTime;
    while (other.processor.load(std::memory_order_relaxed) != processor()) {
      if (poll(posted)) return;
      if (Clock::now() > deadline) break;
    }
    other.sleepers.fetch_add(1, std::memory_order_seq_cst);
    while (!posted()) sleep(other.posted);
    other.sleepers.fetch_sub(1, std::memory_order_relaxed);
  }

#if defined(__linux__)
  static int32_t processor() { return sched_getcpu(); }

  // Sleeps while `other` has not posted. Not std::atomic::wait, which is for threads of a process.
  void sleep(std::atomic<uint32_t>& posted) const {
    const uint32_t before = posted.load(std::memory_order_seq_cst);
    if (int32_t(before - number_) >= 0) return;
    syscall(SYS_futex, &posted, FUTEX_WAIT, before, nullptr, nullptr, 0);
  }

  static void wake(std::atomic<uint32_t>& posted) {
    syscall(SYS_futex, &posted, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
  }
#else
  static int32_t processor() { return -1; }  // unknown, so ranks yield instead of spinning
  void sleep(std::atomic<uint32_t>&) const { std::this_thread::yield(); }
  static void wake(std::atomic<uint32_t>&) {}
#endif

  Rank* ranks_;
  std::byte* slots_;
  int rank_, n_ranks_;
  uint32_t number_ = 0;  // of the exchange
};

}  // namespace hotloop
