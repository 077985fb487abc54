// Whether what rests on pages can be seen here: user-mode emulators (qemu-user) answer madvise without doing anything.
#pragma once
#include <cstdio>
#include <cstdlib>

#include "arena.h"
#include "check.h"

namespace commfuse {

// False only under an emulator of another machine, with a line that says what is not tested; on a real one it is a defect.
inline bool pages_are_seen(const char* not_tested) {
  Arena arena(32 * kPageBytes, 16 * kPageBytes);
  arena.grow(32 * kPageBytes);
  arena.populate(16 * kPageBytes, kPageBytes);
  if (arena.allocated_bytes() != 0) return true;
  CHECK(std::getenv("COMMFUSE_TESTS_EMULATED") != nullptr);
  std::printf("%s not tested: this emulator ignores madvise\n", not_tested);
  return false;
}

}  // namespace commfuse
