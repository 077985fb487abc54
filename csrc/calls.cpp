#include "calls.h"

#include <algorithm>
#include <utility>

#include "error.h"

namespace commfuse {

Calls::Calls(std::shared_ptr<Channel> channel, std::shared_ptr<Turnstile> turns, std::shared_ptr<Slabs> slabs, uint64_t depth)
    : channel_(std::move(channel)), turns_(std::move(turns)), slabs_(std::move(slabs)), depth_(depth),
      present_(std::make_shared<const std::vector<int>>(channel_->active())) {}

Calls::~Calls() {
  if (!turns_->here()) return;
  try {
    retire_stages();
  } catch (const std::exception&) {  // the slabs are lost, no more
  }
}

uint64_t Calls::begin() {
  turns_->calls++;
  open_.push_back(++newest_);
  return newest_;
}

void Calls::forget() {
  if (open_.empty() || open_.back() != newest_) fail("call %zu is over", newest_);
  turns_->calls--;
  open_.pop_back();
  newest_--;
}

void Calls::end(uint64_t sequence) {
  const auto found = std::find(open_.begin(), open_.end(), sequence);
  if (found == open_.end()) return;
  open_.erase(found);
  channel_->advance(kConsumed, open_.empty() ? newest_ : open_.front() - 1);
}

void Calls::restart(uint64_t newest) {
  retire_stages();
  start_ = newest > depth_ ? newest - depth_ : 0;  // the others may still be raising theirs: as in any call, there must be room
  newest_ = newest;
  open_.clear();
}

void Calls::seat(std::vector<int> members) {
  retire_stages();
  channel_->set_active(members);
  present_ = std::make_shared<const std::vector<int>>(std::move(members));
}

uint64_t Calls::stage(uint64_t num_bytes) {
  const auto found = std::find_if(stages_.begin(), stages_.end(), [&](const Stage& stage) {  // in this order: the first stay warm
    return stage.slab->used >= num_bytes && is_free(stage);
  });
  Stage& stage = found == stages_.end() ? add_stage(num_bytes) : *found;
  stage.sequence = newest_ + 1;
  return stage.slab->address;
}

// A new one, in the place of one that was too small if there is such.
Calls::Stage& Calls::add_stage(uint64_t num_bytes) {
  const auto small = std::find_if(stages_.begin(), stages_.end(), [&](const Stage& stage) { return is_free(stage); });
  if (small != stages_.end()) {
    Slab* const slab = small->slab;
    stages_.erase(small);
    slabs_->give(*slab);
  }
  stages_.push_back({&slabs_->take_ready(num_bytes, num_bytes), 0});
  return stages_.back();
}

// Others take part from now on, and those who did may still be reading.
void Calls::retire_stages() {
  for (const Stage& stage : std::exchange(stages_, {})) {
    stage.slab->add_reader(reading(stage.sequence));
    slabs_->give(*stage.slab);
  }
}

}  // namespace commfuse
