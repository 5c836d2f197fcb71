// Polling for what another thread or process will do within microseconds.

#pragma once

namespace hotloop {

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");
#endif
}

// Polls a condition a few times; returns whether it became true.
template <class F> bool poll(F condition) {
  for (int i = 0; i < 16; i++) {
    if (condition()) return true;
    relax();
  }
  return false;
}

}  // namespace hotloop
