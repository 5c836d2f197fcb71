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

// Polls a few times whether something has happened.
template <class F> bool soon(F happened) {
  for (int i = 0; i < 16; i++) {
    if (happened()) return true;
    relax();
  }
  return false;
}

}  // namespace hotloop
