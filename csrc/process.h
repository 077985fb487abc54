// What belongs to one process and must not leak into a forked child: descriptors and the right to touch an arena.
#pragma once
#include <cstdint>

namespace commfuse {

// How many forks lie between the start of the program and this process. A load, so that every entry can afford it.
uint64_t fork_generation() noexcept;

// Remembers in which process an object was made.
class Birthplace {
 public:
  bool here() const noexcept { return generation_ == fork_generation(); }
  // Throws Error in a forked child, where the arenas are not mapped.
  void check(const char* what) const;

 private:
  uint64_t generation_ = fork_generation();
};

// An owned descriptor. A forked child closes its copies at once: a copy would keep the memory of a dead parent
// allocated, and would hide from peers that the parent's socket was closed.
class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd);
  Fd(Fd&& other) noexcept;
  Fd& operator=(Fd&& other) noexcept;
  ~Fd();
  int get() const noexcept { return fd_; }
  explicit operator bool() const noexcept { return fd_ >= 0; }

 private:
  void close() noexcept;
  int fd_ = -1;
  Birthplace born_;
};

// Bytes that may still be allocated here: the smaller of the system's MemAvailable and the room left in every
// memory cgroup above this process (version 1 or 2). UINT64_MAX where neither can be read.
uint64_t available_memory();

void random_bytes(void* out, uint64_t num_bytes);

}  // namespace commfuse
