// One group on this host: the control blocks of all its members, publications, and the poison word.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "control.h"
#include "arena.h"
#include "sources.h"
#include "wait.h"

namespace commfuse {

// What a rank is about to publish: where its data lies, and bytes for the others to read.
struct Offer {
  uint32_t agreed_bytes = 0;
  uint64_t vouched = 0;  // see Record
  std::vector<uint8_t> body;
  struct {
    uint64_t address = 0, num_bytes = 0;
  } segments[kSegments];
};

// Why a group can go on no longer. Packed in one word, so that exactly one cause wins; newer epochs compare greater.
struct Poison {
  uint16_t epoch = 0;
  uint16_t code = 0;     // the caller's
  uint16_t subject = 0;  // the member it is about
  uint16_t finder = 0;   // the member whose text explains it
  uint64_t pack() const {
    return uint64_t(epoch) << 48 | uint64_t(code) << 32 | uint64_t(subject) << 16 | (uint64_t(finder) + 1);
  }
  static Poison unpack(uint64_t word) {
    return {uint16_t(word >> 48), uint16_t(word >> 32), uint16_t(word >> 16), uint16_t((word & 0xffff) - 1)};
  }
};

class Channel {
 public:
  // The own control block, made before the others can attach: take it with make_control, tell the others its offset.
  static uint64_t make_control(Arena& arena, uint64_t group_id, uint32_t header_bytes, uint32_t depth);

  // `peers[i]` and `offsets[i]`: window and control block of member i; the window of `index` itself is null.
  Channel(std::shared_ptr<Arena> arena, const std::vector<std::shared_ptr<Mapping>>& peers, const std::vector<uint64_t>& offsets,
          int index, uint64_t group_id);
  ~Channel();
  Channel(const Channel&) = delete;
  Channel& operator=(const Channel&) = delete;

  void check_process() const { born_.check("a group"); }
  int num_members() const { return static_cast<int>(members_.size()); }
  int index() const { return index_; }
  // This member's place among the active ones.
  int position() const { return position_; }

  // Members that take part from now on, in the order of their ids; must contain this one.
  void set_active(const std::vector<int>& members);
  const std::vector<int>& active() const { return active_; }

  // Writes the header of operation `sequence` into the ring, then raises kPublished. Throws Error when a member has not
  // consumed what the ring slot held before (wait for kConsumed >= sequence - depth first).
  void publish(uint64_t sequence, const Offer& offer);
  void advance(LineIndex line, uint64_t value);
  void post(uint64_t number, const uint8_t* bytes, uint64_t num_bytes);

  bool all_reached(LineIndex line, uint64_t target, std::memory_order order = std::memory_order_acquire) const noexcept;
  Outcome wait(LineIndex line, uint64_t target, int64_t timeout_ns, bool heed_poison, bool (*interrupted)()) noexcept;
  Outcome wait_member(int member, LineIndex line, uint64_t target, int64_t timeout_ns, bool heed_poison, bool (*interrupted)());

  // Compares the headers of all active members for `sequence` with `offer` and looks up their segments.
  // Returns -1, or the first member whose sequence or agreed bytes differ. Throws Error when a segment does not lie in
  // its member's window.
  int resolve(uint64_t sequence, const Offer& offer);
  std::shared_ptr<Sources> sources(int segment) const;
  // Whether all members vouch for the same operation, by the headers that `resolve` has compared last.
  bool all_vouch() const { return all_vouch_; }

  std::vector<uint8_t> body(int member, uint64_t sequence) const;
  uint64_t sequence_in_slot(int member, uint64_t sequence) const;
  std::vector<uint8_t> posted(int member, uint64_t number) const;
  uint64_t counter(int member, LineIndex line) const;
  bool alive(int member) const;

  // Poisons all members with this cause unless an earlier one of this epoch (or a newer) stands. True if it was the first.
  bool poison(uint16_t code, uint16_t subject, const std::string& text);
  bool poisoned() const {
    check_process();
    return word() >= poison_from();
  }
  Poison cause() const {
    check_process();
    return Poison::unpack(word());
  }
  std::string cause_text() const;
  // From a new epoch on, the poison of older ones is ignored: survivors that have agreed to leave a member out go on.
  void set_epoch(uint16_t epoch) { epoch_ = epoch; }
  uint16_t epoch() const { return epoch_; }

  int64_t spin_ns = WaitRules().spin_ns, slice_ns = WaitRules().slice_ns;
  // For each member, how long its counters were waited for, added up.
  const std::vector<uint64_t>& waited_ns() const { return waited_ns_; }
  void set_waited_ns(std::vector<uint64_t> waited_ns);
  uint64_t moved_ns = 0;  // time in which rows were written, copied and summed, by calls that repeat (see repeat.h)

 private:
  struct Member {
    std::shared_ptr<Mapping> window;
    Control* control;
  };
  const Member& member(int index) const;
  const Record* slot(const Member& member, uint64_t sequence) const;
  void raise_own(LineIndex line, uint64_t value) noexcept;
  void take_segments(int position, const Member& member, const Record& record);
  WaitRules rules_for(int64_t timeout_ns, bool heed_poison, bool (*interrupted)()) const noexcept;
  uint64_t word() const { return own_->poison.value.load(std::memory_order_acquire); }
  uint64_t poison_from() const { return (uint64_t(epoch_) << 48) | 1; }

  Birthplace born_;
  std::shared_ptr<Arena> arena_;
  std::vector<Member> members_;
  std::vector<int> active_;
  std::vector<Watch> watches_;
  std::vector<std::shared_ptr<Sources>> sources_;
  std::vector<uint64_t> waited_ns_;
  int index_, position_;
  bool all_vouch_ = false;
  Control* own_;
  uint64_t own_offset_;
  uint32_t header_bytes_, depth_;
  uint16_t epoch_ = 0;
};

}  // namespace commfuse
