// One memfd of this process that all ranks of the host map: control blocks in front, slabs behind them.
//
//   offset 0                control_bytes                     size                max_bytes
//   | control blocks ...    | slabs (the caller's)            | not there yet     |
//
// The whole range up to max_bytes is mapped once; growing only moves the end of the file. So no address ever changes,
// here or in a peer, and a peer needs no message to see what was added.
#pragma once
#include <array>
#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <vector>

#include "process.h"

namespace commfuse {

constexpr uint64_t kPageBytes = 65536;  // granule of all bookkeeping: the largest page size of the supported machines

using ArenaId = std::array<uint8_t, 16>;

// What an arena of this process and one of a peer have in common: a mapped file that can only grow.
class Mapping {
 public:
  Mapping(Fd fd, uint64_t max_bytes, uint64_t control_bytes, bool is_own);
  virtual ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  uint8_t* base() const { return base_; }
  uint64_t max_bytes() const { return max_bytes_; }
  uint64_t control_bytes() const { return control_bytes_; }
  int fd() const { return fd_.get(); }
  // Whether the process that owns it lives. An own arena's does.
  virtual bool alive() const noexcept { return true; }
  bool here() const noexcept { return born_.here(); }
  void check_process() const { born_.check("a window"); }
  // Bytes of the file now; reads beyond it would be a bus error, so every range is compared with it first.
  uint64_t size() const;
  // Whether [offset, offset + num_bytes) lies in the slab part of the file.
  bool holds(uint64_t offset, uint64_t num_bytes) const;
  // Address of a range of the slab part. Throws Error where it does not lie inside.
  uint8_t* at(uint64_t offset, uint64_t num_bytes) const;
  // Address of a range of the control part.
  uint8_t* control_at(uint64_t offset, uint64_t num_bytes) const;
  // Maps pages that already exist into this process, so that no later read faults. A hint: failure is not an error.
  void prefault_read(uint64_t offset, uint64_t num_bytes) const;

 protected:
  Birthplace born_;
  Fd fd_;
  uint8_t* base_ = nullptr;
  const uint64_t max_bytes_, control_bytes_;
  mutable std::atomic<uint64_t> known_size_{0};
};

class Arena : public Mapping {
 public:
  // Throws Error when the address space cannot be reserved or memfd is refused.
  Arena(uint64_t max_bytes, uint64_t control_bytes);

  const ArenaId& id() const { return id_; }
  // Makes the file at least num_bytes long. No page is touched.
  void grow(uint64_t num_bytes);
  // Allocates and maps the pages of a range for writing. Ranges populated before cost a look at a bitmap.
  // Throws OutOfMemory before any page is touched when the limit or the memory at hand does not suffice.
  void populate(uint64_t offset, uint64_t num_bytes);
  // Gives the whole pages of a range back to the system; they read as zeros afterwards.
  void punch(uint64_t offset, uint64_t num_bytes);
  // Lets children that are forked from now on see a range, too: they share it with this process. The rest is not mapped in them.
  void show_to_children(uint64_t offset, uint64_t num_bytes) const;
  uint64_t allocated_bytes() const;
  // Bytes of a range that hold pages, whoever touched them.
  uint64_t allocated_bytes(uint64_t offset, uint64_t num_bytes) const;
  uint64_t offset_of(uint64_t address, uint64_t num_bytes) const;

  void set_limit(uint64_t num_bytes) { limit_bytes_ = num_bytes; }
  uint64_t limit() const { return limit_bytes_; }

  // Control blocks: zeroed memory in the control part, reused when the owner has given it back and no peer is attached.
  uint64_t take_control(uint64_t num_bytes);
  void give_back_control(uint64_t offset);

 private:
  void populate_run(uint64_t offset, uint64_t num_bytes);
  void check_room(uint64_t num_bytes) const;

  ArenaId id_;
  std::atomic<uint64_t> limit_bytes_;
  mutable std::mutex mutex_;
  std::vector<bool> populated_;             // one bit per granule
  std::map<uint64_t, uint64_t> returned_;   // control blocks given back: offset -> bytes
  std::map<uint64_t, uint64_t> in_use_;
  uint64_t control_used_ = 0;
};

}  // namespace commfuse
