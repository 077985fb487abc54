#include "slabs.h"

#include <algorithm>
#include <utility>

#include "error.h"

namespace commfuse {

namespace {

constexpr uint64_t kTail = 1 << 20;        // a slab is only looked at for pages behind its used part if they could be this many bytes
constexpr uint64_t kLargeTail = 64 << 20;  // filled bytes there of which the user is told

// Rounds up to one of eight sizes an octave, in whole pages, so that slabs of similar sizes serve each other.
uint64_t size_class(uint64_t num_bytes) {
  uint64_t step = kPageBytes;
  while (step << 4 <= num_bytes) step <<= 1;
  return std::max<uint64_t>((num_bytes + step - 1) / step, 1) * step;
}

}  // namespace

bool Reading::is_over() const {
  if (channel->epoch() == epoch) {
    if (channel->all_reached(kConsumed, sequence)) return true;
    if (!channel->poisoned()) return false;
  }
  return std::all_of(members->begin(), members->end(), [&](int member) {  // left out since then, one may be reading still
    return member == channel->index() || channel->counter(member, kConsumed) >= sequence || !channel->alive(member);
  });
}

void Slab::add_reader(Reading reading) {
  readers.erase(std::remove_if(readers.begin(), readers.end(), [&](const Reading& one) {
    return one.channel == reading.channel && one.epoch == reading.epoch;
  }), readers.end());
  readers.push_back(std::move(reading));
}

bool Slab::in_use() {
  readers.erase(std::remove_if(readers.begin(), readers.end(), [](const Reading& one) { return one.is_over(); }), readers.end());
  return !readers.empty();
}

Slabs::Slabs(std::shared_ptr<Arena> arena, Tell on_large_tail)
    : arena_(std::move(arena)), on_large_tail_(std::move(on_large_tail)), end_(arena_->control_bytes()) {}

Slab& Slabs::take(uint64_t num_bytes) {
  arena_->check_process();
  if (num_bytes > arena_->max_bytes()) arena_->grow(num_bytes);  // throws
  tidy();
  tell();
  const uint64_t size = size_class(num_bytes);
  std::vector<Slab*>& free = free_[size];
  if (!free.empty()) {
    Slab* const slab = free.back();
    free.pop_back();
    return *slab;
  }
  arena_->grow(end_ + size);
  all_.push_back({end_, size, reinterpret_cast<uint64_t>(arena_->base()) + end_, 0, {}});
  end_ += size;
  return all_.back();
}

Slab& Slabs::take_ready(uint64_t num_bytes, uint64_t used) {
  Slab& slab = take(num_bytes);
  try {
    populate(slab, used);
  } catch (...) {
    give(slab);
    throw;
  }
  return slab;
}

void Slabs::populate(Slab& slab, uint64_t num_bytes) {
  if (num_bytes <= slab.used) return;  // only what lies behind is ever given back
  try {
    fill(slab, num_bytes);
  } catch (const OutOfMemory&) {
    if (!empty_free()) throw;  // not this one, which is not free
    fill(slab, num_bytes);
  }
  slab.used = num_bytes;
}

void Slabs::give(Slab& slab) {
  if (slab.in_use()) {
    waiting_.push_back(&slab);
    return;
  }
  free_[slab.num_bytes].push_back(&slab);
  if (slab.num_bytes - slab.used >= kTail) punch_tail(slab);
}

bool Slabs::empty_free() {
  tidy();
  bool has_any = false;
  for (auto& [size, slabs] : free_)
    for (Slab* slab : slabs) {
      if (slab->used == 0) continue;
      arena_->punch(slab->offset, slab->num_bytes);
      slab->used = 0;
      has_any = true;
    }
  return has_any;
}

Slab* Slabs::at(uint64_t address) const {
  const auto found = held_.find(address);
  return found == held_.end() ? nullptr : found->second;
}

void Slabs::tidy() {
  if (returned)
    for (const uint64_t address : returned()) {
      const auto found = held_.find(address);
      if (found == held_.end()) continue;  // it was let go
      Slab* const slab = found->second;
      held_.erase(found);
      give(*slab);
    }
  if (waiting_.empty()) return;
  for (Slab* slab : std::exchange(waiting_, {})) give(*slab);
}

// Gives back pages behind the used part, which an operation on a whole buffer may have filled.
void Slabs::punch_tail(Slab& slab) {
  const uint64_t first = slab.offset + slab.used, tail = slab.num_bytes - slab.used;
  const uint64_t next_page = (first + kPageBytes - 1) / kPageBytes * kPageBytes;  // the used part's last page is filled in any case
  const uint64_t filled = arena_->allocated_bytes(next_page, slab.offset + slab.num_bytes - next_page);
  if (filled >= kTail) arena_->punch(first, tail);
  if (filled < kLargeTail || has_told_) return;
  has_told_ = true;
  tail_filled_ = filled;
  tail_used_ = slab.used;
}

// At a moment when nothing is lost if it is answered by an exception.
void Slabs::tell() {
  if (tail_filled_) on_large_tail_(std::exchange(tail_filled_, 0), tail_used_);
}

}  // namespace commfuse
