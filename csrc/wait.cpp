#include "wait.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <ctime>

#include "arena.h"

namespace commfuse {
namespace {

// The kernel compares 32 bits: the low half of the counter, wherever the machine keeps it.
uint32_t* low_half(Line& line) {
  auto* halves = reinterpret_cast<uint32_t*>(&line.value);
  return halves + (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__ ? 1 : 0);
}

// Not FUTEX_PRIVATE: the word lies in a file that several processes map.
int sleep_on(Line& line, uint32_t expected, int64_t timeout_ns) {
  const timespec timeout{static_cast<time_t>(timeout_ns / 1000000000), static_cast<long>(timeout_ns % 1000000000)};
  return syscall(SYS_futex, low_half(line), FUTEX_WAIT, expected, &timeout, nullptr, 0) == 0 ? 0 : errno;
}

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");  // "yield" does nothing on most cores; isb waits about as long as x86's pause
#else
  std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

class Wait {
 public:
  Wait(Watch* watches, size_t num_watches, uint64_t target, const WaitRules& rules)
      : watches_(watches), num_(num_watches), target_(target), rules_(rules), start_(now_ns()), looked_(start_) {}

  Outcome run() {
    if (spin()) return {};
    for (Outcome seen;; seen = sleep_once()) {
      if (seen.status == Status::interrupted) return seen;  // an exception is pending: not to be lost
      if (sweep()) return {};
      if (seen.status != Status::ok) return seen;
    }
  }

 private:
  // Removes what has arrived; true when nothing is missing.
  bool sweep() {
    int64_t now = 0;
    for (size_t i = 0; i < num_;) {
      if (!reached(*watches_[i].line, target_)) {
        i++;
        continue;
      }
      if (watches_[i].waited_ns) {
        if (!now) now = now_ns();
        const int64_t raised = watches_[i].line->raised_ns.load(std::memory_order_relaxed);
        *watches_[i].waited_ns += static_cast<uint64_t>(std::clamp(raised, start_, now) - start_);
      }
      std::move(watches_ + i + 1, watches_ + num_, watches_ + i);  // order kept: the first missing one is named
      num_--;
    }
    return num_ == 0;
  }

  bool spin() {
    if (sweep()) return true;
    while (now_ns() - start_ < rules_.spin_ns)
      for (int i = 0; i < 16; i++) {
        relax();
        if (sweep()) return true;
      }
    return false;
  }

  Outcome sleep_once() {
    Line& line = rules_.bell ? *rules_.bell : *watches_[0].line;
    int64_t slice = rules_.slice_ns;
    if (rules_.timeout_ns >= 0) slice = std::clamp<int64_t>(start_ + rules_.timeout_ns - now_ns(), 0, slice);
    // Sequentially consistent on both sides (see raise, Channel::raise_own and Channel::poison): either we see the new value,
    // or its writer sees us waiting. Poison changes the bell, but no counter: where we sleep on one, poison that comes between
    // our look and our sleep is seen when the slice ends.
    line.waiters.fetch_add(1, std::memory_order_seq_cst);
    const uint64_t value = line.value.load(std::memory_order_seq_cst);
    int error = 0;
    if (must_wait() && !poisoned()) error = sleep_on(line, static_cast<uint32_t>(value), slice);
    line.waiters.fetch_sub(1, std::memory_order_relaxed);
    const int64_t now = now_ns();
    // Woken without need (a nudge, or another member's turn) there is nothing new but perhaps poison.
    if (error == 0 && now - looked_ < rules_.slice_ns) return poisoned() ? Outcome{Status::poisoned, first()} : Outcome{};
    return look_around(now);
  }

  // After the look at the word that we shall sleep on: what comes later changes that word.
  bool must_wait() const {
    const auto is_missing = [&](const Watch& watch) { return !reached(*watch.line, target_, std::memory_order_seq_cst); };
    return rules_.bell ? std::any_of(watches_, watches_ + num_, is_missing) : is_missing(watches_[0]);
  }

  Outcome look_around(int64_t now) {
    looked_ = now;
    if (poisoned()) return {Status::poisoned, first()};
    for (size_t i = 0; i < num_; i++) {
      const Watch& watch = watches_[i];
      // It may have published and then died: only what it has not published will never come.
      if (!watch.window->alive() && !reached(*watch.line, target_)) return {Status::dead, watch.member};
    }
    if (rules_.interrupted && rules_.interrupted()) return {Status::interrupted, first()};
    if (rules_.timeout_ns >= 0 && now - start_ >= rules_.timeout_ns) return {Status::deadline, first()};
    return {};
  }

  bool poisoned() const {
    return rules_.poison && rules_.poison->load(std::memory_order_seq_cst) >= rules_.poison_from;
  }
  int first() const { return watches_[0].member; }

  Watch* watches_;
  size_t num_;
  const uint64_t target_;
  const WaitRules& rules_;
  const int64_t start_;
  int64_t looked_;
};

}  // namespace

int64_t now_ns() noexcept {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t(now.tv_sec) * 1000000000 + now.tv_nsec;
}

void raise(Line& line, uint64_t value) noexcept {
  line.raised_ns.store(now_ns(), std::memory_order_relaxed);
  line.value.store(value, std::memory_order_seq_cst);
  if (line.waiters.load(std::memory_order_seq_cst) != 0) nudge(line);
}

void ring(Line& bell) noexcept {
  bell.value.fetch_add(1, std::memory_order_seq_cst);
  if (bell.waiters.load(std::memory_order_seq_cst) != 0) nudge(bell);
}

// A killed sleeper stays counted in `waiters`; from then on each raise makes this call in vain, which is harmless.
void nudge(Line& line) noexcept { syscall(SYS_futex, low_half(line), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }

Outcome wait_all(Watch* watches, size_t num_watches, uint64_t target, const WaitRules& rules) noexcept {
  return Wait(watches, num_watches, target, rules).run();
}

}  // namespace commfuse
