// Pieces of this process's arena, handed out and taken back when nobody needs them.
//
// A slab is free again when its holder has given it back and every operation that published it has been consumed by all living
// peers. Slabs are sparse: addresses are reserved for all of one, memory only for what is written. What was used last is used
// first, so that pages stay warm. One thread at a time.
#pragma once
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <unordered_map>
#include <vector>

#include "arena.h"
#include "channel.h"

namespace commfuse {

// An operation that has published a slab to `members`, who may be reading it.
struct Reading {
  std::shared_ptr<Channel> channel;
  uint64_t sequence = 0;
  uint16_t epoch = 0;
  std::shared_ptr<const std::vector<int>> members;
  // Whether every one of them has finished, or has ended.
  bool is_over() const;
};

struct Slab {
  uint64_t offset = 0, num_bytes = 0, address = 0;
  uint64_t used = 0;  // bytes that have been made ready to be written
  std::vector<Reading> readers;
  // What one group's latest operation has published says all of its operations before.
  void add_reader(Reading reading);
  bool in_use();
};

class Slabs {
 public:
  // `on_large_tail(filled, used)`: told once, when pages were filled far behind the used part of a slab.
  using Tell = std::function<void(uint64_t filled, uint64_t used)>;
  Slabs(std::shared_ptr<Arena> arena, Tell on_large_tail);
  virtual ~Slabs() = default;
  Slabs(const Slabs&) = delete;
  Slabs& operator=(const Slabs&) = delete;

  // A free slab of at least num_bytes; its memory is not there yet. Throws OutOfMemory when the address space is used up.
  Slab& take(uint64_t num_bytes);
  // The same, and its first `used` bytes can be written. Throws OutOfMemory when there is not enough memory, too.
  Slab& take_ready(uint64_t num_bytes, uint64_t used);
  // Makes its first num_bytes ready to be written, if need be in the place of all free slabs' memory. Throws OutOfMemory before
  // anything is touched.
  void populate(Slab& slab, uint64_t num_bytes);
  // Takes it back; it is handed out again when its readers are done.
  void give(Slab& slab);
  // Gives the memory of all free slabs back to the system; false when they have none.
  bool empty_free();

  // A slab that lies under somebody's memory, from `hold` until its address is in what `returned` tells.
  void hold(Slab& slab) { held_[slab.address] = &slab; }
  void let_go(Slab& slab) { held_.erase(slab.address); }  // its memory is nobody's yet
  Slab* at(uint64_t address) const;
  std::function<std::vector<uint64_t>()> returned;

  const std::shared_ptr<Arena>& arena() const { return arena_; }

 protected:
  // Lets the system give the first num_bytes of a slab their memory, which may take milliseconds.
  virtual void fill(const Slab& slab, uint64_t num_bytes) { arena_->populate(slab.offset, num_bytes); }

 private:
  void tidy();
  void punch_tail(Slab& slab);
  void tell();
  std::shared_ptr<Arena> arena_;
  Tell on_large_tail_;
  uint64_t end_;
  uint64_t tail_filled_ = 0, tail_used_ = 0;  // to be told
  bool has_told_ = false;
  std::deque<Slab> all_;
  std::map<uint64_t, std::vector<Slab*>> free_;  // by size
  std::vector<Slab*> waiting_;                   // nobody holds them here, but peers may be reading
  std::unordered_map<uint64_t, Slab*> held_;
};

}  // namespace commfuse
