#include "channel.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "error.h"

namespace commfuse {

namespace {

bool are_sizes(uint32_t header_bytes, uint32_t depth) {
  return header_bytes >= sizeof(Record) && header_bytes % kLineBytes == 0 && header_bytes <= (1u << 20) && depth >= 1 &&
         depth <= 1024;
}

struct Sizes {
  uint32_t header_bytes, depth;
};

// What a member's block says of itself, read once: its peers can write to it at any time.
Sizes sizes_of(const Mapping& window, uint64_t offset, uint64_t group_id, int member) {
  const auto* control = reinterpret_cast<const Control*>(window.control_at(offset, sizeof(Control)));
  if (__atomic_load_n(&control->layout, __ATOMIC_ACQUIRE) != kLayout || control->group_id != group_id)
    fail("member %d has no control block of this group there", member);
  const Sizes sizes{__atomic_load_n(&control->header_bytes, __ATOMIC_RELAXED), __atomic_load_n(&control->depth, __ATOMIC_RELAXED)};
  if (!are_sizes(sizes.header_bytes, sizes.depth))
    fail("member %d has headers of %u bytes, %u deep", member, sizes.header_bytes, sizes.depth);
  window.control_at(offset, control_size(sizes.header_bytes, sizes.depth));
  return sizes;
}

}  // namespace

uint64_t Channel::make_control(Arena& arena, uint64_t group_id, uint32_t header_bytes, uint32_t depth) {
  if (!are_sizes(header_bytes, depth))
    fail("headers of %u bytes, %u deep: at least %zu, a multiple of %zu; 1 to 1024 deep", header_bytes, depth,
         sizeof(Record), kLineBytes);
  const uint64_t bytes = control_size(header_bytes, depth), offset = arena.take_control(bytes);
  auto* control = reinterpret_cast<Control*>(arena.control_at(offset, bytes));
  control->group_id = group_id;
  control->header_bytes = header_bytes;
  control->depth = depth;
  __atomic_store_n(&control->layout, kLayout, __ATOMIC_RELEASE);
  return offset;
}

Channel::Channel(std::shared_ptr<Arena> arena, const std::vector<std::shared_ptr<Mapping>>& peers,
                 const std::vector<uint64_t>& offsets, int index, uint64_t group_id)
    : arena_(std::move(arena)), waited_ns_(peers.size()), index_(index), position_(index) {
  const int num_members = static_cast<int>(peers.size());
  if (offsets.size() != peers.size() || index < 0 || index >= num_members || num_members > 0xffff)
    fail("member %d of %d with %zu control blocks", index, num_members, offsets.size());
  own_offset_ = offsets[static_cast<size_t>(index)];
  const Sizes own_sizes = sizes_of(*arena_, own_offset_, group_id, index);
  header_bytes_ = own_sizes.header_bytes;
  depth_ = own_sizes.depth;
  for (int i = 0; i < num_members; i++) {
    const auto& peer = peers[static_cast<size_t>(i)];
    if ((peer == nullptr) != (i == index)) fail("member %d: every member but this one needs a peer", i);
    const std::shared_ptr<Mapping> window = peer ? peer : arena_;
    const uint64_t offset = offsets[static_cast<size_t>(i)];
    const Sizes sizes = sizes_of(*window, offset, group_id, i);
    if (sizes.header_bytes != header_bytes_ || sizes.depth != depth_) fail("member %d has headers of another size", i);
    members_.push_back({window, reinterpret_cast<Control*>(window->control_at(offset, sizeof(Control)))});
    active_.push_back(i);
  }
  own_ = members_[static_cast<size_t>(index)].control;
  for (const Member& other : members_)  // last, when nothing can fail any more: a failed one must not count as attached
    if (other.control != own_) other.control->attached.fetch_add(1, std::memory_order_acq_rel);
  for (int i = 0; i < kSegments; i++) sources_.push_back(std::make_shared<Sources>(num_members));
  watches_.reserve(members_.size());
}

Channel::~Channel() {
  if (!born_.here()) return;
  for (const Member& other : members_)
    if (other.control != own_) other.control->attached.fetch_sub(1, std::memory_order_acq_rel);
  arena_->give_back_control(own_offset_);
}

const Channel::Member& Channel::member(int index) const {
  check_process();
  if (index < 0 || index >= num_members()) fail("member %d of %d", index, num_members());
  return members_[static_cast<size_t>(index)];
}

void Channel::set_active(const std::vector<int>& members) {
  for (int one : members) member(one);
  if (std::count(members.begin(), members.end(), index_) != 1) fail("the active members must contain this one, once");
  active_ = members;
  position_ = static_cast<int>(std::find(members.begin(), members.end(), index_) - members.begin());
  for (auto& sources : sources_) sources->resize(static_cast<int>(members.size()));
}

const Record* Channel::slot(const Member& member, uint64_t sequence) const {
  const auto* ring = reinterpret_cast<const uint8_t*>(member.control + 1);
  return reinterpret_cast<const Record*>(ring + sequence % depth_ * header_bytes_);
}

void Channel::publish(uint64_t sequence, const Offer& offer) {
  member(index_);
  if (sizeof(Record) + offer.body.size() > header_bytes_ || offer.agreed_bytes > offer.body.size())
    fail("a header body of %zu bytes, %u agreed, in a slot of %u", offer.body.size(), offer.agreed_bytes, header_bytes_);
  Record record{sequence, offer.agreed_bytes, static_cast<uint32_t>(offer.body.size()), offer.vouched, {}};
  for (int i = 0; i < kSegments; i++) {
    const auto& segment = offer.segments[i];
    if (segment.num_bytes) record.segments[i] = {arena_->offset_of(segment.address, segment.num_bytes), segment.num_bytes};
  }
  const uint64_t published = own_->lines[kPublished].value.load(std::memory_order_relaxed);
  if (sequence <= published) fail("operation %zu is published already", sequence);
  if (sequence > depth_ && !all_reached(kConsumed, sequence - depth_))
    fail("operation %zu would overwrite a header that a member has not consumed", sequence);
  auto* out = reinterpret_cast<uint8_t*>(const_cast<Record*>(slot(members_[static_cast<size_t>(index_)], sequence)));
  std::memcpy(out, &record, sizeof record);
  std::copy(offer.body.begin(), offer.body.end(), out + sizeof record);
  raise_own(kPublished, sequence);
}

void Channel::advance(LineIndex line, uint64_t value) {
  member(index_);
  if (value < own_->lines[line].value.load(std::memory_order_relaxed)) fail("a counter never goes back");
  raise_own(line, value);
}

// Who publishes last sees that all have: of two that do so at once, at least one sees the other (both orders are the same to all).
void Channel::raise_own(LineIndex line, uint64_t value) noexcept {
  raise(own_->lines[line], value);
  if (line == kPublished && all_reached(line, value, std::memory_order_seq_cst)) ring(members_[0].control->lines[kBell]);
}

// Two slots in turn: a reader of message n is safe until message n + 2, which an agreement in rounds never posts early.
void Channel::post(uint64_t number, const uint8_t* bytes, uint64_t num_bytes) {
  member(index_);
  if (num_bytes > kPostBytes) fail("a message of %zu bytes, at most %zu", num_bytes, kPostBytes);
  std::memset(own_->board[number % 2], 0, kPostBytes);
  if (num_bytes) std::memcpy(own_->board[number % 2], bytes, num_bytes);
  advance(kPosted, number);
}

bool Channel::all_reached(LineIndex line, uint64_t target, std::memory_order order) const noexcept {
  return std::all_of(active_.begin(), active_.end(), [&](int i) {
    return i == index_ || reached(members_[static_cast<size_t>(i)].control->lines[line], target, order);
  });
}

WaitRules Channel::rules_for(int64_t timeout_ns, bool heed_poison, bool (*interrupted)()) const noexcept {
  WaitRules result;
  result.spin_ns = spin_ns;
  result.slice_ns = slice_ns;
  result.timeout_ns = timeout_ns;
  result.poison = heed_poison ? &own_->poison.value : nullptr;
  result.poison_from = poison_from();
  result.interrupted = interrupted;
  return result;
}

Outcome Channel::wait(LineIndex line, uint64_t target, int64_t timeout_ns, bool heed_poison, bool (*interrupted)()) noexcept {
  watches_.clear();
  const size_t num_active = active_.size();
  const auto start = static_cast<size_t>(position_);
  for (size_t i = 1; i < num_active; i++) {  // each rank begins with its right neighbour, so that not all watch rank 0
    const int one = active_[(start + i) % num_active];
    const Member& other = members_[static_cast<size_t>(one)];
    watches_.push_back({&other.control->lines[line], one, other.window.get(), &waited_ns_[static_cast<size_t>(one)]});
  }
  WaitRules rules = rules_for(timeout_ns, heed_poison, interrupted);
  // The bell rings when all have published: without this rank it would not.
  if (line == kPublished && reached(own_->lines[line], target)) rules.bell = &members_[0].control->lines[kBell];
  return wait_all(watches_.data(), watches_.size(), target, rules);
}

Outcome Channel::wait_member(int index, LineIndex line, uint64_t target, int64_t timeout_ns, bool heed_poison,
                             bool (*interrupted)()) {
  const Member& other = member(index);
  Watch watch{&other.control->lines[line], index, other.window.get(), &waited_ns_[static_cast<size_t>(index)]};
  return wait_all(&watch, 1, target, rules_for(timeout_ns, heed_poison, interrupted));
}

void Channel::set_waited_ns(std::vector<uint64_t> waited_ns) {
  if (waited_ns.size() != members_.size()) fail("%zu numbers for %zu members", waited_ns.size(), members_.size());
  waited_ns_ = std::move(waited_ns);
}

int Channel::resolve(uint64_t sequence, const Offer& offer) {
  member(index_);
  all_vouch_ = offer.vouched != 0;
  for (size_t position = 0; position < active_.size(); position++) {
    const Member& other = members_[static_cast<size_t>(active_[position])];
    if (!reached(other.control->lines[kPublished], sequence))
      fail("member %d has not published operation %zu yet", active_[position], sequence);
    const Record* shared = slot(other, sequence);
    Record record;  // a copy: what has been checked must be what is used
    std::memcpy(&record, shared, sizeof record);
    if (record.sequence != sequence || record.agreed_bytes != offer.agreed_bytes ||
        sizeof record + uint64_t(record.body_bytes) > header_bytes_ || record.agreed_bytes > record.body_bytes ||
        (offer.agreed_bytes != 0 && std::memcmp(shared + 1, offer.body.data(), offer.agreed_bytes) != 0))
      return active_[position];
    all_vouch_ = all_vouch_ && record.vouched == offer.vouched;
    take_segments(static_cast<int>(position), other, record);
  }
  return -1;
}

void Channel::take_segments(int position, const Member& member, const Record& record) {
  for (int i = 0; i < kSegments; i++) {
    const Segment& segment = record.segments[i];
    const bool is_empty = segment.num_bytes == 0;
    sources_[static_cast<size_t>(i)]->set(
        position, is_empty ? Range() : Range{member.window->at(segment.offset, segment.num_bytes), segment.num_bytes});
  }
}

std::shared_ptr<Sources> Channel::sources(int segment) const {
  if (segment < 0 || segment >= kSegments) fail("segment %d of %d", segment, kSegments);
  return sources_[static_cast<size_t>(segment)];
}

std::vector<uint8_t> Channel::body(int index, uint64_t sequence) const {
  const Record* shared = slot(member(index), sequence);
  const uint32_t num_bytes = std::min<uint32_t>(shared->body_bytes, header_bytes_ - sizeof(Record));
  const auto* bytes = reinterpret_cast<const uint8_t*>(shared + 1);
  return {bytes, bytes + num_bytes};
}

uint64_t Channel::sequence_in_slot(int index, uint64_t sequence) const { return slot(member(index), sequence)->sequence; }

std::vector<uint8_t> Channel::posted(int index, uint64_t number) const {
  const Member& other = member(index);
  if (!reached(other.control->lines[kPosted], number)) fail("member %d has not posted message %zu", index, number);
  const uint8_t* bytes = other.control->board[number % 2];
  return {bytes, bytes + kPostBytes};
}

uint64_t Channel::counter(int index, LineIndex line) const {
  return member(index).control->lines[line].value.load(std::memory_order_acquire);
}

bool Channel::alive(int index) const {
  return member(index).window->alive();
}

// Member 0's block decides which cause is the first, dead or not: its memory stays mapped. Then all get the winner, and
// only then is anybody woken: a sleeper reads its own word, and may sleep on the counter of any member.
bool Channel::poison(uint16_t code, uint16_t subject, const std::string& text) {
  member(index_);
  std::atomic<uint64_t>& arbiter = members_[0].control->poison.value;
  const uint64_t mine = Poison{epoch_, code, subject, static_cast<uint16_t>(index_)}.pack();
  uint64_t winner = arbiter.load(std::memory_order_acquire);
  if (winner < poison_from()) {  // the text first: whoever sees the word may read it
    std::memset(own_->text, 0, kTextBytes);
    std::memcpy(own_->text, text.data(), std::min<size_t>(text.size(), kTextBytes - 1));
  }
  bool is_first = false;
  while (winner < poison_from() && !is_first)
    is_first = arbiter.compare_exchange_weak(winner, mine, std::memory_order_seq_cst, std::memory_order_acquire);
  if (is_first) winner = mine;
  for (Member& other : members_) {
    std::atomic<uint64_t>& word = other.control->poison.value;
    for (uint64_t old = word.load(std::memory_order_seq_cst); old >> 48 < winner >> 48 || old == 0;)
      if (word.compare_exchange_weak(old, winner, std::memory_order_seq_cst, std::memory_order_seq_cst)) break;
  }
  for (Member& other : members_)
    for (Line& line : other.control->lines)
      if (line.waiters.load(std::memory_order_seq_cst) != 0) nudge(line);
  ring(members_[0].control->lines[kBell]);
  return is_first;
}

std::string Channel::cause_text() const {
  const uint64_t cause = word();
  if (cause == 0) return "";
  const char* text = member(Poison::unpack(cause).finder).control->text;
  return std::string(text, strnlen(text, kTextBytes));
}

}  // namespace commfuse
