// What kernels/cpu/pool.h promises, one promise per argument; exits with 0 where it is kept.

#include "pool.h"

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

namespace {

using hotloop::Pool;

void check(bool kept, const char* what) {
  if (kept) return;
  std::fprintf(stderr, "%s\n", what);
  std::_Exit(1);
}

// Leaves in each unit's cell how often it was committed, and a value that depends on the unit alone.
struct Squares : hotloop::Task {
  std::vector<int>& commits;
  std::vector<int64_t>& values;

  Squares(std::vector<int>& commits, std::vector<int64_t>& values, int64_t grain_size = 1)
      : commits(commits), values(values) {
    units = int64_t(commits.size());
    this->grain_size = grain_size;
    unit_bytes = sizeof(int64_t);
  }

  void compute(int64_t begin, int64_t end, std::byte* result) const override {
    for (int64_t i = begin; i < end; i++) {
      const int64_t square = i * i;
      std::memcpy(result + (i - begin) * sizeof square, &square, sizeof square);
    }
  }

  void commit(int64_t begin, int64_t end, const std::byte* result) const override {
    for (int64_t i = begin; i < end; i++) {
      commits[i]++;
      std::memcpy(&values[i], result + (i - begin) * sizeof values[i], sizeof values[i]);
    }
  }
};

void check_squares(const std::vector<int>& commits, const std::vector<int64_t>& values) {
  for (size_t i = 0; i < commits.size(); i++) {
    check(commits[i] == 1, "each unit is committed once");
    check(values[i] == int64_t(i * i), "each unit has its own value");
  }
}

void compute_squares(int64_t units, int threads, int64_t grain_size = 1) {
  std::vector<int> commits(units);
  std::vector<int64_t> values(units);
  Pool::shared().run(std::make_unique<Squares>(commits, values, grain_size), threads);
  check_squares(commits, values);
}

// A worker that takes a chunk does not come back before the test lets it.
struct Stuck final : Squares {
  const std::thread::id caller = std::this_thread::get_id();
  std::atomic<bool>& taken;
  std::atomic<bool>& released;
  std::atomic<int>& deleted;

  Stuck(std::vector<int>& commits, std::vector<int64_t>& values, std::atomic<bool>& taken,
        std::atomic<bool>& released, std::atomic<int>& deleted)
      : Squares(commits, values), taken(taken), released(released), deleted(deleted) {}

  ~Stuck() override {
    check(std::this_thread::get_id() == caller, "the caller deletes the task");
    deleted++;
  }

  void compute(int64_t begin, int64_t end, std::byte* result) const override {
    if (std::this_thread::get_id() == caller) {
      while (!taken) std::this_thread::yield();  // or the caller takes them all
    } else {
      taken = true;
      while (!released) std::this_thread::yield();
    }
    Squares::compute(begin, end, result);
  }
};

void every_size() {
  for (const int threads : {1, 2, 3, 7}) {
    for (const int64_t units : {0, 1, 2, 15, 33, 1000}) {
      for (const int64_t grain : {1, 4, 2000}) compute_squares(units, threads, grain);
    }
  }
}

void worker_that_does_not_come_back() {
  std::vector<int> commits(64);
  std::vector<int64_t> values(64);
  std::atomic<bool> taken = false, released = false;
  std::atomic<int> deleted = 0;
  Pool::shared().run(std::make_unique<Stuck>(commits, values, taken, released, deleted), 2);
  check_squares(commits, values);
  check(deleted == 0, "the task outlives the worker that is in it");
  for (int i = 0; i < 100; i++) compute_squares(64, 2);
  check(deleted == 0, "the task outlives the worker that is in it");
  released = true;
  while (!deleted) {
    compute_squares(64, 2);
    std::this_thread::yield();
  }
  check_squares(commits, values);
}

void several_callers() {
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; i++) {
    callers.emplace_back([] {
      for (int j = 0; j < 300; j++) compute_squares(40, 2);
    });
  }
  for (auto& caller : callers) caller.join();
}

void forked_child() {
  compute_squares(64, 2);
  const pid_t child = fork();
  if (child == 0) {
    for (int i = 0; i < 10; i++) compute_squares(64, 2);
    std::_Exit(0);
  }
  int status = 1;
  waitpid(child, &status, 0);
  check(status == 0, "a forked child has a pool of its own");
  compute_squares(64, 2);
}

// A worker that sleeps is woken, a caller that does not wait for it loses nothing.
void pauses() {
  for (int i = 0; i < 20; i++) {
    compute_squares(64, 2);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

}  // namespace

int main(int, char** arguments) {
  const std::string promise = arguments[1];
  if (promise == "every_size") every_size();
  if (promise == "worker_that_does_not_come_back") worker_that_does_not_come_back();
  if (promise == "several_callers") several_callers();
  if (promise == "forked_child") forked_child();
  if (promise == "pauses") pauses();
  std::_Exit(0);  // while workers sleep or spin
}
