#include "repeat.h"

#include <algorithm>
#include <cstring>

namespace commfuse {

namespace {

constexpr uint64_t kAlign = 64;

uint64_t aligned(uint64_t num_bytes) { return (num_bytes + kAlign - 1) / kAlign * kAlign; }

void set_segment(Offer& offer, int index, const void* begin, uint64_t num_bytes) {
  offer.segments[index] = {reinterpret_cast<uint64_t>(begin), num_bytes};
}

const uint8_t* pointer_of(uint64_t address) { return reinterpret_cast<const uint8_t*>(address); }

bool check_keys(KeyCheck& check, const RawKeys& raw, int64_t num_rows, uint8_t* out) {
  int64_t active = num_rows;
  if (raw.by_row) active = num_rows - std::count(raw.mask, raw.mask + num_rows, uint8_t{0});
  return check.run(raw.keys, num_rows, active, raw.by_row ? nullptr : raw.mask, reinterpret_cast<int32_t*>(out));
}

// Adds the time until its end.
class Moving {
 public:
  explicit Moving(Channel& channel) : total_(channel.moved_ns), begin_(now_ns()) {}
  ~Moving() { total_ += static_cast<uint64_t>(now_ns() - begin_); }
  Moving(const Moving&) = delete;
  Moving& operator=(const Moving&) = delete;

 private:
  uint64_t& total_;
  const int64_t begin_;
};

}  // namespace

void set_number(Offer& offer, uint32_t at, uint64_t number) {
  if (uint64_t(at) + 8 > offer.body.size()) fail("a number at %u of %zu bytes", at, offer.body.size());
  for (uint32_t i = 0; i < 8; i++) offer.body[at + i] = static_cast<uint8_t>(number >> 8 * i);
}

RepeatedDispatch::RepeatedDispatch(Channel& channel, KeyCheck& check, KeySort& sort, const Form& form)
    : channel_(channel), check_(check), sort_(sort), form_(form) {
  if (form.num_tokens < 1 || form.hidden < 1) fail("%zd rows of %zd", form.num_tokens, form.hidden);
  rows_at_ = aligned(pair_bytes());
  factors_at_ = rows_at_ + aligned(uint64_t(form.num_tokens) * row_bytes());
  weights_at_ = factors_at_ + (form.quantised ? aligned(uint64_t(form.num_tokens) * sizeof(float)) : 0);
}

bool RepeatedDispatch::publish(uint64_t sequence, Offer& offer, const Given& given, uint8_t* staging) {
  if (!check_keys(check_, given.keys, form_.num_tokens, staging)) return false;
  const auto num_tokens = static_cast<uint64_t>(form_.num_tokens);
  uint8_t* const rows = staging + rows_at_;
  auto* const factors = reinterpret_cast<float*>(staging + factors_at_);
  auto* const weights = reinterpret_cast<float*>(staging + weights_at_);
  {
    const Moving moving(channel_);
    if (form_.quantised)
      quantise_rows({form_.dtype, form_.hidden, form_.num_tokens, given.rows, uint64_t(form_.hidden) * size_of(form_.dtype),
                     form_.num_tokens, nullptr, nullptr, 0, nullptr},
                    reinterpret_cast<int8_t*>(rows), factors);
    else
      std::memcpy(rows, given.rows, num_tokens * row_bytes());
    if (form_.weighted) write_weights(given.weights, weights);
  }
  set_segment(offer, 0, staging, pair_bytes());
  set_segment(offer, 1, rows, num_tokens * row_bytes());
  set_segment(offer, 2, factors, form_.quantised ? num_tokens * sizeof(float) : 0);
  set_segment(offer, 3, weights, form_.weighted ? pair_bytes() : 0);
  channel_.publish(sequence, offer);
  return true;
}

// [num_tokens, out_width]: those of the keys that were given, 0 behind them.
void RepeatedDispatch::write_weights(const float* weights, float* out) const {
  const int width = check_.width(), out_width = check_.out_width();
  for (int64_t token = 0; token < form_.num_tokens; token++, weights += width, out += out_width) {
    std::copy(weights, weights + width, out);
    std::fill(out + width, out + out_width, 0.0f);
  }
}

int64_t RepeatedDispatch::count(uint64_t sequence, const Offer& offer) {
  if (channel_.resolve(sequence, offer) != -1) return -1;
  const int64_t num_rows = sort_.run(*channel_.sources(0));
  sort_.remember(sequence, {pointer_of(offer.segments[0].address), offer.segments[0].num_bytes});
  return num_rows;
}

void RepeatedDispatch::place(const Outputs& out) const {
  const Moving moving(channel_);
  sort_.place(*channel_.sources(1), out.rows, out.rows_bytes, row_bytes(), row_bytes(), false, form_.nt_bytes);
  if (form_.quantised)
    sort_.place(*channel_.sources(2), reinterpret_cast<uint8_t*>(out.factors), out.factors_bytes, 4, 4, false, 0);
  if (form_.weighted)
    sort_.place(*channel_.sources(3), reinterpret_cast<uint8_t*>(out.weights), out.weights_bytes, 4, 4, true, 0);
  sort_.write_tags(out.tags);
  sort_.write_key_counts(out.key_counts, form_.cumulative);
  const std::vector<int32_t>& counts = sort_.running_counts();
  std::copy(counts.begin(), counts.end(), out.running_counts);
}

RepeatedCombine::RepeatedCombine(Channel& channel, KeyCheck& check, TermPlan& terms, const KeySort& sort, const Form& form)
    : channel_(channel), check_(check), plan_(terms), sort_(sort), form_(form) {
  if (form.num_tokens < 1 || form.hidden < 1 || form.num_counts < 1 || form.room < 0)
    fail("%zd sums of %zd, %zd counts of at most %zd", form.num_tokens, form.hidden, form.num_counts, form.room);
  terms_.resize(static_cast<size_t>(form.num_tokens) * static_cast<size_t>(check.out_width()));
}

int64_t RepeatedCombine::num_held(const int32_t* running_counts) const {
  const int32_t last = last_sum(running_counts, form_.num_counts);
  return last > form_.room ? -1 : last;
}

RepeatedCombine::Cut RepeatedCombine::cut(int64_t num_rows, bool in_place) const {
  Cut result{};
  const auto rows = static_cast<uint64_t>(num_rows);
  result.tags = aligned(static_cast<uint64_t>(form_.num_counts) * sizeof(int32_t));
  result.rows = result.tags + aligned(rows * 3 * sizeof(int32_t));
  result.keys = result.rows + (in_place ? 0 : aligned(rows * row_bytes()));
  result.end = result.keys + terms_.size() * sizeof(int32_t);
  return result;
}

bool RepeatedCombine::publish(uint64_t sequence, Offer& offer, int64_t num_rows, const Held& held, const RawKeys& keys,
                              uint8_t* staging) {
  const Cut at = cut(num_rows, held.in_place);
  if (!check_keys(check_, keys, form_.num_tokens, staging + at.keys)) return false;
  keys_ = reinterpret_cast<const int32_t*>(staging + at.keys);
  const auto rows = static_cast<uint64_t>(num_rows);
  const uint64_t count_bytes = static_cast<uint64_t>(form_.num_counts) * sizeof(int32_t);
  std::memcpy(staging, held.running_counts, count_bytes);
  std::memcpy(staging + at.tags, held.tags, rows * 3 * sizeof(int32_t));
  own_rows_ = held.in_place ? nullptr : held.rows;
  num_rows_ = num_rows;
  if (!held.in_place) copy_in(reinterpret_cast<const int32_t*>(staging), staging + at.rows);
  set_segment(offer, 0, staging, count_bytes);
  set_segment(offer, 1, staging + at.tags, rows * 3 * sizeof(int32_t));
  const bool is_whole = num_rows == sort_.num_rows() && sort_.running_counts().size() == static_cast<size_t>(form_.num_counts);
  const auto* const counts = reinterpret_cast<const int32_t*>(staging);  // what is published, whatever becomes of the original
  const auto* const tags = reinterpret_cast<const int32_t*>(staging + at.tags);
  offer.vouched = is_whole ? sort_.recall(keys_, terms_.size(), counts, tags) : 0;
  set_segment(offer, 2, held.in_place ? held.rows : staging + at.rows, rows * row_bytes());
  channel_.publish(sequence, offer);
  return true;
}

// Rows that go to others: block i came from member i % num_members. This rank reads its own where they lie.
void RepeatedCombine::copy_in(const int32_t* running_counts, uint8_t* out) const {
  const Moving moving(channel_);
  const CopyRow copy = copy_row(static_cast<uint64_t>(num_rows_) * row_bytes(), form_.nt_bytes, row_bytes());
  const int64_t num_members = static_cast<int64_t>(channel_.active().size()), me = channel_.position();
  int64_t begin = 0;
  for (int64_t i = 0; i < form_.num_counts; i++) {
    const int64_t end = std::clamp<int64_t>(running_counts[i], begin, num_rows_);  // they may have changed since they were checked
    const uint64_t first = static_cast<uint64_t>(begin) * row_bytes(), num_bytes = static_cast<uint64_t>(end - begin) * row_bytes();
    if (i % num_members != me && num_bytes) copy.run(out + first, own_rows_ + first, num_bytes);
    begin = end;
  }
  copy.finish();
}

int RepeatedCombine::find(uint64_t sequence, const Offer& offer, const float* weights) {
  if (channel_.resolve(sequence, offer) != -1) return -1;
  if (own_rows_) channel_.sources(2)->set(channel_.position(), {own_rows_, static_cast<uint64_t>(num_rows_) * row_bytes()});
  const TermPlan::Input input{keys_, form_.num_tokens, weights, channel_.sources(0).get(), channel_.sources(1).get(),
                              channel_.sources(2).get(), row_bytes(), row_bytes()};
  if (!plan_.run(input, terms_.data(), check_.out_width())) return plan_.fault;
  channel_.advance(kProgress, 2 * sequence);
  return 0;
}

void RepeatedCombine::sum(uint8_t* out) const {
  const Moving moving(channel_);
  combine_rows(form_.dtype, false, terms_.data(), form_.num_tokens, check_.out_width(), form_.hidden, out, row_bytes());
}

Outcome RepeatedCombine::hear(uint64_t sequence, int64_t timeout_ns, bool (*interrupted)(), bool* differs) {
  Outcome outcome;
  *differs = false;
  if (channel_.all_vouch()) return outcome;
  if (!channel_.all_reached(kProgress, 2 * sequence))
    outcome = channel_.wait(kProgress, 2 * sequence, timeout_ns, true, interrupted);
  *differs = outcome.status == Status::ok && std::any_of(channel_.active().begin(), channel_.active().end(), [&](int member) {
    return channel_.counter(member, kProgress) == 2 * sequence + 1;
  });
  return outcome;
}

}  // namespace commfuse
