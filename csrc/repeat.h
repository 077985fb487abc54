// Calls of known sizes: the steps before and after a wait, each in one go. What others read of it is the same as where
// a caller takes the steps one by one (see _core.pyi), so ranks of one call may do either.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "channel.h"
#include "keys.h"
#include "rows.h"

namespace commfuse {

// Writes the number of a call, little-endian, into the body of its header.
void set_number(Offer& offer, uint32_t at, uint64_t number);

// The raw keys of a call, and which of them take part. A mask of a byte for each row has every 1 before every 0.
struct RawKeys {
  const int32_t* keys;
  const uint8_t* mask = nullptr;  // null: all
  bool by_row = false;            // a byte for each row, otherwise for each pair
};

// Rows to the owners of their keys. Segments: keys, rows, (quantised) a factor for each row, (weighted) a weight for each pair.
class RepeatedDispatch {
 public:
  struct Form {
    Dtype dtype;
    int64_t num_tokens, hidden;
    bool quantised, weighted, cumulative;
    uint64_t nt_bytes;
  };
  struct Given {
    RawKeys keys;
    const uint8_t* rows;
    const float* weights;
  };
  struct Outputs {
    uint8_t* rows;
    uint64_t rows_bytes;
    float* factors;
    uint64_t factors_bytes;
    float* weights;
    uint64_t weights_bytes;
    int32_t* tags;
    int64_t* key_counts;
    int32_t* running_counts;
  };
  RepeatedDispatch(Channel& channel, KeyCheck& check, KeySort& sort, const Form& form);

  uint64_t staged_bytes() const { return weights_at_ + (form_.weighted ? pair_bytes() : 0); }
  // False, and nothing is published, when the keys are not all valid.
  bool publish(uint64_t sequence, Offer& offer, const Given& given, uint8_t* staging);
  // When all have published: the number of rows for this rank; -1 when the headers are not all equal.
  int64_t count(uint64_t sequence, const Offer& offer);
  void place(const Outputs& out) const;

 private:
  uint64_t row_bytes() const { return uint64_t(form_.hidden) * (form_.quantised ? 1 : size_of(form_.dtype)); }
  uint64_t pair_bytes() const { return uint64_t(form_.num_tokens) * static_cast<uint64_t>(check_.out_width()) * 4; }
  void write_weights(const float* weights, float* out) const;
  Channel& channel_;
  KeyCheck& check_;
  KeySort& sort_;
  const Form form_;
  uint64_t rows_at_, factors_at_, weights_at_;
};

// Rows back to where they came from, summed. Segments: running counts, tags, rows (those for others); the keys stay here.
class RepeatedCombine {
 public:
  struct Form {
    Dtype dtype;
    int64_t num_tokens, hidden, num_counts, room;  // room: the most rows that may be held
    uint64_t nt_bytes;
  };
  struct Held {  // what this rank has been handed: how many rows, where they and what belongs to them lie
    const int32_t* running_counts;
    const int32_t* tags;
    const uint8_t* rows;
    bool in_place;  // the rows lie in this process's window
  };
  // `sort`: that of the dispatches whose rows come back. Ranks that are sure of theirs need not hear each other's verdicts.
  RepeatedCombine(Channel& channel, KeyCheck& check, TermPlan& terms, const KeySort& sort, const Form& form);

  // Rows held, by the last of the running counts; -1 when these are not counts of that many.
  int64_t num_held(const int32_t* running_counts) const;
  uint64_t staged_bytes(int64_t num_rows, bool in_place) const { return cut(num_rows, in_place).end; }
  const int32_t* keys() const { return keys_; }
  bool publish(uint64_t sequence, Offer& offer, int64_t num_rows, const Held& held, const RawKeys& keys, uint8_t* staging);
  // When all have published: 0, or a fault of TermPlan; -1 when the headers are not all equal.
  int find(uint64_t sequence, const Offer& offer, const float* weights);
  void sum(uint8_t* out) const;
  // What came of waiting until every member has said what it found; `differs` when one has found a fault. Without a wait where
  // all have brought back unchanged what the same dispatch gave them: then nobody finds one.
  Outcome hear(uint64_t sequence, int64_t timeout_ns, bool (*interrupted)(), bool* differs);

 private:
  struct Cut {
    uint64_t tags, rows, keys, end;
  };
  Cut cut(int64_t num_rows, bool in_place) const;
  void copy_in(const int32_t* running_counts, uint8_t* out) const;
  uint64_t row_bytes() const { return uint64_t(form_.hidden) * size_of(form_.dtype); }
  Channel& channel_;
  KeyCheck& check_;
  TermPlan& plan_;
  const KeySort& sort_;
  const Form form_;
  std::vector<Term> terms_;
  const int32_t* keys_ = nullptr;
  const uint8_t* own_rows_ = nullptr;  // the caller's, where only those for others have been copied
  int64_t num_rows_ = 0;
};

}  // namespace commfuse
