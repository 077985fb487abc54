// The calls of one rank in a group: one thread at a time, their numbers, and what they have published meanwhile.
#pragma once
#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "channel.h"
#include "slabs.h"

namespace commfuse {

// What all calls of a group go through, on whichever line.
class Turnstile {
 public:
  // Begins a call of this thread; false in a forked child, and while another one is under way. `leave` ends it.
  bool enter() noexcept { return born_.here() && !is_shut_.exchange(true, std::memory_order_acquire); }
  void leave() noexcept { is_shut_.store(false, std::memory_order_release); }
  bool here() const noexcept { return born_.here(); }
  bool is_shut() const noexcept { return is_shut_.load(std::memory_order_relaxed); }

  uint64_t calls = 0;    // begun since the group began or began anew: the number of the present one
  uint64_t seating = 0;  // changes when other ranks take part, when they sit in another order, or must agree anew
  // What the next call has to see to before it publishes: then calls that repeat go the long way.
  bool has_told_others = false;
  uint64_t unheard = 0;

 private:
  Birthplace born_;
  std::atomic<bool> is_shut_{false};
};

// One line of calls, each with a place of its own: published, met, read, ended.
class Calls {
 public:
  // `depth`: of the ring of headers.
  Calls(std::shared_ptr<Channel> channel, std::shared_ptr<Turnstile> turns, std::shared_ptr<Slabs> slabs, uint64_t depth);
  ~Calls();
  Calls(const Calls&) = delete;
  Calls& operator=(const Calls&) = delete;

  uint64_t newest() const { return newest_; }
  // The call whose header the next one will overwrite: every rank must have consumed it. 0: none.
  uint64_t in_the_way() const { return newest_ + 1 > start_ + depth_ ? newest_ + 1 - depth_ : 0; }
  // Takes the next place. Nothing may be in the way.
  uint64_t begin();
  // Takes the newest place back: nothing was published.
  void forget();
  // This rank has read all it needs of the data of the call at `sequence`. Nothing happens if the group has begun anew since then.
  void end(uint64_t sequence);
  // Begins anew behind the call at `newest`.
  void restart(uint64_t newest);
  // The members that take part have changed: see Channel::set_active.
  void seat(std::vector<int> members);

  // What keeps a slab from being used again: that the call at `sequence` has published it.
  Reading reading(uint64_t sequence) const { return {channel_, sequence, channel_->epoch(), present_}; }
  // Where the next call, one of those that repeat, may put num_bytes to be published: a few slabs in turn, free again when every
  // peer has read what lies there. Throws OutOfMemory before anything is touched.
  uint64_t stage(uint64_t num_bytes);

  Channel& channel() const { return *channel_; }
  Turnstile& turns() const { return *turns_; }

 private:
  struct Stage {
    Slab* slab;
    uint64_t sequence;  // the call that used it last
  };
  bool is_free(const Stage& stage) const { return channel_->all_reached(kConsumed, stage.sequence); }
  Stage& add_stage(uint64_t num_bytes);
  void retire_stages();

  std::shared_ptr<Channel> channel_;
  std::shared_ptr<Turnstile> turns_;
  std::shared_ptr<Slabs> slabs_;
  const uint64_t depth_;
  uint64_t start_ = 0, newest_ = 0;
  std::deque<uint64_t> open_;
  std::shared_ptr<const std::vector<int>> present_;
  std::vector<Stage> stages_;
};

}  // namespace commfuse
