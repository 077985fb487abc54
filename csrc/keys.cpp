#include "keys.h"

#include <algorithm>
#include <cstring>

namespace commfuse {

KeyCheck::KeyCheck(int width, int64_t num_keys, int64_t first_special, int64_t end_special, std::vector<int32_t> extra_keys)
    : width_(width), num_keys_(num_keys), first_special_(first_special), end_special_(end_special),
      extra_keys_(std::move(extra_keys)), scratch_(static_cast<size_t>(std::max(width, 0))) {
  if (width < 1 || num_keys < 0 || first_special < num_keys || end_special < first_special)
    fail("keys: width %d, %zd keys, specials %zd to %zd", width, num_keys, first_special, end_special);
}

KeyCheck::Fault KeyCheck::check_row(const int32_t* raw, const uint8_t* mask, int* column) {
  int num_seen = 0;
  for (*column = 0; *column < width_; ++*column) {
    if (mask && !mask[*column]) continue;
    const int32_t key = raw[*column];
    const bool is_valid = (key >= 0 && key < num_keys_) || (key >= first_special_ && key < end_special_);
    if (!is_valid) return out_of_range;
    // Rows are short (a token's experts): looking back is cheaper than any table.
    if (std::find(scratch_.begin(), scratch_.begin() + num_seen, key) != scratch_.begin() + num_seen) return duplicate;
    scratch_[static_cast<size_t>(num_seen++)] = key;
  }
  return none;
}

void KeyCheck::write_row(const int32_t* raw, const uint8_t* mask, int32_t* out) const {
  bool takes_part = false;
  for (int column = 0; column < width_; column++) {
    if (mask && !mask[column]) continue;
    takes_part = true;
    if (raw[column] < num_keys_) out[column] = raw[column];
  }
  if (takes_part) std::copy(extra_keys_.begin(), extra_keys_.end(), out + width_);
}

bool KeyCheck::run(const int32_t* raw, int64_t num_rows, int64_t active_rows, const uint8_t* mask, int32_t* out) {
  fault = none;
  bad_pair = -1;
  if (out) std::fill(out, out + num_rows * out_width(), -1);
  for (int64_t row = 0; row < std::min(num_rows, active_rows); row++) {
    const int32_t* keys = raw + row * width_;
    const uint8_t* flags = mask ? mask + row * width_ : nullptr;
    int column = 0;
    if ((fault = check_row(keys, flags, &column)) != none) {
      bad_pair = row * width_ + column;
      bad_key = keys[column];
      return false;
    }
    if (out) write_row(keys, flags, out + row * out_width());
  }
  return true;
}

int32_t last_sum(const int32_t* sums, int64_t num_sums) {
  int32_t last = 0;
  for (int64_t i = 0; i < num_sums; i++) {
    if (sums[i] < last) return -1;
    last = sums[i];
  }
  return last;
}

KeySort::KeySort(int width, int64_t num_keys, int64_t first, int64_t end)
    : width_(width), num_keys_(num_keys), first_(first), end_(end) {
  if (width < 1 || first < 0 || end < first || num_keys < end)
    fail("sorting keys %zd to %zd of %zd, rows of %d", first, end, num_keys, width);
}

int64_t KeySort::run(const Sources& keys) {
  keys.check_process();
  sequence_ = 0;
  num_sources_ = keys.size();
  taken_.clear();
  source_end_.clear();
  source_pairs_.clear();
  counts_.assign(static_cast<size_t>((end_ - first_) * num_sources_), 0);
  for (int source = 0; source < num_sources_; source++) count_source(keys[source], source);
  next_.resize(counts_.size());
  int32_t running = 0;
  for (size_t i = 0; i < counts_.size(); i++) {
    next_[i] = running;
    running += counts_[i];
    counts_[i] = running;
  }
  int64_t i = 0;
  for (int source = 0; source < num_sources_; source++)
    for (; i < source_end_[static_cast<size_t>(source)]; i++) {
      Taken& one = taken_[static_cast<size_t>(i)];  // `place` still holds the local key
      one.place = next_[static_cast<size_t>(one.place) * num_sources_ + source]++;
    }
  return num_rows();
}

void KeySort::count_source(const Range& keys, int source) {
  const auto num_pairs = static_cast<int64_t>(keys.num_bytes / sizeof(int32_t));
  if (keys.num_bytes % (sizeof(int32_t) * width_) != 0 || num_pairs > INT32_MAX)
    fail("source %d published %zu bytes of keys, not whole rows of %d", source, keys.num_bytes, width_);
  for (int64_t pair = 0; pair < num_pairs; pair++) {
    int32_t key;  // read once: a peer's memory
    std::memcpy(&key, keys.data + pair * sizeof key, sizeof key);
    if (key < -1 || key >= num_keys_)
      fail("source %d published key %d at pair %zd, valid are -1 to %zd", source, key, pair, num_keys_ - 1);
    if (key < first_ || key >= end_) continue;
    const auto local = static_cast<int32_t>(key - first_);
    counts_[static_cast<size_t>(local) * num_sources_ + source]++;
    taken_.push_back({static_cast<int32_t>(pair), local});
  }
  source_end_.push_back(num_rows());
  source_pairs_.push_back(num_pairs);
}

void KeySort::remember(uint64_t sequence, const Range& own_keys) {
  const auto* first = reinterpret_cast<const int32_t*>(own_keys.data);
  own_keys_.assign(first, first + own_keys.num_bytes / sizeof(int32_t));
  sequence_ = sequence;
}

uint64_t KeySort::recall(const int32_t* keys, uint64_t num_keys, const int32_t* running_counts, const int32_t* tags) const {
  if (sequence_ == 0 || num_keys != own_keys_.size() || !std::equal(own_keys_.begin(), own_keys_.end(), keys) ||
      !std::equal(counts_.begin(), counts_.end(), running_counts))
    return 0;
  int64_t i = 0;
  for (int source = 0; source < num_sources_; source++)
    for (; i < source_end_[static_cast<size_t>(source)]; i++) {
      const Taken& one = taken_[static_cast<size_t>(i)];
      const int32_t tag[3] = {source, one.pair / width_, one.pair % width_};
      if (std::memcmp(tags + int64_t(one.place) * 3, tag, sizeof tag) != 0) return 0;
    }
  return sequence_;
}

void KeySort::write_key_counts(int64_t* out, bool cumulative) const {
  int64_t before = 0;
  for (int64_t key = 0; key < end_ - first_; key++) {
    const int64_t upto = num_sources_ ? counts_[static_cast<size_t>((key + 1) * num_sources_ - 1)] : 0;
    out[key] = cumulative ? upto : upto - before;
    before = upto;
  }
}

void KeySort::write_tags(int32_t* out) const {
  int64_t i = 0;
  for (int source = 0; source < num_sources_; source++)
    for (; i < source_end_[static_cast<size_t>(source)]; i++) {
      const Taken& one = taken_[static_cast<size_t>(i)];
      int32_t* tag = out + int64_t(one.place) * 3;
      tag[0] = source;
      tag[1] = one.pair / width_;
      tag[2] = one.pair % width_;
    }
}

void KeySort::place(const Sources& items, uint8_t* out, uint64_t out_bytes, uint64_t item_bytes, uint64_t stride,
                    bool per_pair, uint64_t nt_bytes) const {
  items.check_process();
  if (items.size() != num_sources_ || item_bytes == 0 || stride < item_bytes) fail("items of another group, or of no bytes");
  if (taken_.size() > out_bytes / item_bytes)
    fail("%zu rows of %zu bytes do not fit into %zu", taken_.size(), item_bytes, out_bytes);
  const CopyRow copy = copy_row(taken_.size() * item_bytes, nt_bytes, item_bytes);
  int64_t i = 0;
  for (int source = 0; source < num_sources_; source++) {
    const int64_t end = source_end_[static_cast<size_t>(source)];
    const int64_t num_items = source_pairs_[static_cast<size_t>(source)] / (per_pair ? 1 : width_);
    const Range& range = items[source];
    if (i < end && (range.num_bytes < item_bytes || (range.num_bytes - item_bytes) / stride < uint64_t(num_items - 1)))
      fail("source %d published %zu bytes for %zd items of %zu", source, range.num_bytes,
           num_items, stride);
    for (; i < end; i++) {
      const Taken& one = taken_[static_cast<size_t>(i)];
      const int64_t item = per_pair ? one.pair : one.pair / width_;
      copy.run(out + uint64_t(one.place) * item_bytes, range.data + uint64_t(item) * stride, item_bytes);
    }
  }
  copy.finish();
}

TermPlan::TermPlan(int width, int num_weighted, int num_sources, int me, std::vector<int32_t> owners, std::vector<int32_t> slots)
    : width_(width), num_weighted_(num_weighted), num_sources_(num_sources), me_(me), owners_(std::move(owners)),
      slots_(std::move(slots)) {
  if (width < 1 || num_weighted < 0 || num_weighted > width || me < 0 || me >= num_sources || owners_.size() != slots_.size())
    fail("terms: width %d (%d weighted), source %d of %d", width, num_weighted, me, num_sources);
  for (size_t key = 0; key < owners_.size(); key++)
    if (owners_[key] < 0 || owners_[key] >= num_sources || slots_[key] < 0)
      fail("key %zu: owner %d, slot %d", key, owners_[key], slots_[key]);
}

// First use of a key: where this rank's block begins and ends among the owner's rows.
TermPlan::Fault TermPlan::start(const Input& input, int32_t key) {
  const size_t k = static_cast<size_t>(key);
  const Range& range = (*input.counts)[owners_[k]];
  const uint64_t index = uint64_t(slots_[k]) * num_sources_ + me_;
  if ((index + 1) * sizeof(int32_t) > range.num_bytes) return count;
  next_[k] = 0;
  if (index > 0) std::memcpy(&next_[k], range.data + (index - 1) * sizeof(int32_t), sizeof(int32_t));
  std::memcpy(&stop_[k], range.data + index * sizeof(int32_t), sizeof(int32_t));
  return next_[k] < 0 || stop_[k] < next_[k] ? count : none;
}

TermPlan::Fault TermPlan::locate(const Input& input, int64_t pair, Term& term) {
  const int32_t k = input.keys[pair];
  if (k < -1 || k >= static_cast<int64_t>(owners_.size())) return key;
  if (k == -1) return none;
  bad_owner = owners_[static_cast<size_t>(k)];
  int32_t& next = next_[static_cast<size_t>(k)];
  if (next < 0)
    if (const Fault wrong = start(input, k); wrong != none) return wrong;
  if (next >= stop_[static_cast<size_t>(k)]) return count;
  const auto place = static_cast<uint64_t>(next++);
  if (input.tags) {
    const Range& tags = (*input.tags)[bad_owner];
    const int32_t expected[3] = {me_, static_cast<int32_t>(pair / width_), static_cast<int32_t>(pair % width_)};
    if (tags.num_bytes / sizeof expected <= place) return bounds;
    if (std::memcmp(tags.data + place * sizeof expected, expected, sizeof expected) != 0) return tag;
  }
  const Range& items = (*input.items)[bad_owner];
  if (items.num_bytes < input.item_bytes || (items.num_bytes - input.item_bytes) / input.stride < place) return bounds;
  term.address = reinterpret_cast<uint64_t>(items.data + place * input.stride);
  term.kind = Term::row;
  return none;
}

// After all pairs have found their rows: every block of this rank must be used up, also those that no pair asked for.
TermPlan::Fault TermPlan::find_rest(const Input& input) {
  for (size_t k = 0; k < owners_.size(); k++) {
    bad_owner = owners_[k];
    if (next_[k] < 0)
      if (const Fault wrong = start(input, static_cast<int32_t>(k)); wrong != none) return wrong;
    if (next_[k] != stop_[k]) return rest;
  }
  return none;
}

bool TermPlan::run(const Input& input, Term* out, int64_t terms_per_row) {
  input.items->check_process();
  if (terms_per_row < width_ || input.stride == 0 || input.items->size() != num_sources_ ||
      input.counts->size() != num_sources_ || (input.tags && input.tags->size() != num_sources_))
    fail("terms: %zd a row for a width of %d, stride %zu", terms_per_row, width_, input.stride);
  next_.assign(owners_.size(), -1);
  stop_.assign(owners_.size(), 0);
  bad_pair = -1;
  for (int64_t row = 0; row < input.num_rows; row++)
    for (int column = 0; column < width_; column++) {
      const int64_t pair = row * width_ + column;
      Term& term = out[row * terms_per_row + column];
      term = {};
      if ((fault = locate(input, pair, term)) != none) {
        bad_pair = pair;
        return false;
      }
      if (term.kind == Term::nothing) continue;
      term.weight = input.weights && column < num_weighted_ ? input.weights[row * num_weighted_ + column] : 1.0f;
    }
  if ((fault = find_rest(input)) != none) return false;
  bad_owner = -1;
  return true;
}

}  // namespace commfuse
