// Waiting for counters of peers: spin a little, then sleep in slices and look around. Never throws.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "control.h"

namespace commfuse {

class Mapping;

enum class Status : int { ok, dead, deadline, poisoned, interrupted };

struct Outcome {
  Status status = Status::ok;
  int member = 0;  // the first peer that was missing; for `dead` the dead one
};

// One counter to wait for.
struct Watch {
  Line* line;
  int member;
  const Mapping* window;  // of that peer: knows whether it lives
  uint64_t* waited_ns;    // where the time until its arrival is added; may be null
};

struct WaitRules {
  int64_t spin_ns = 50000;      // short when ranks outnumber cores: a spinner then keeps its peer from running
  int64_t slice_ns = 20000000;  // longest time between two looks at peers, poison, deadline and signals
  int64_t timeout_ns = -1;      // negative: no deadline
  const std::atomic<uint64_t>* poison = nullptr;  // this rank's own poison word
  uint64_t poison_from = 1;     // a word of at least this value ends the wait
  bool (*interrupted)() = nullptr;  // asked once a slice
  Line* bell = nullptr;             // raised when the last of what is awaited has come; null: each one wakes who sleeps on it
};

int64_t now_ns() noexcept;

// Raises a counter and wakes who sleeps on it. Everything written before is visible to whoever has seen the new value.
// A system call is made only when somebody sleeps.
void raise(Line& line, uint64_t value) noexcept;
// Raises a counter that has no owner by one.
void ring(Line& bell) noexcept;
// Wakes the sleepers of a counter so that they look around; the counter stays.
void nudge(Line& line) noexcept;

inline bool reached(const Line& line, uint64_t target, std::memory_order order = std::memory_order_acquire) noexcept {
  return line.value.load(order) >= target;
}

// Returns when every watched counter is at least `target`, or with the first reason why that will not happen.
// `watches` is used up: arrived entries are removed.
Outcome wait_all(Watch* watches, size_t num_watches, uint64_t target, const WaitRules& rules) noexcept;

}  // namespace commfuse
