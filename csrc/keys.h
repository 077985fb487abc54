// Integer keys to places: which row goes where, by counting. To the core a key is a number below `num_keys` that some
// member owns; -1 stands for "nothing". Pairs are numbered row by row: pair = row * width + column.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "rows.h"
#include "sources.h"

namespace commfuse {

// Checks the raw keys of one rank and writes them in the form that is published.
class KeyCheck {
 public:
  // A raw key is valid in [0, num_keys) and in [first_special, end_special). Special ones address no member: they
  // become -1. `extra_keys` are appended to every row in which any pair takes part.
  KeyCheck(int width, int64_t num_keys, int64_t first_special, int64_t end_special, std::vector<int32_t> extra_keys);

  enum Fault : int { none, out_of_range, duplicate };

  // raw: [num_rows, width]; out: [num_rows, width + extras], or null to check alone. Rows from `active_rows` on and pairs whose
  // mask byte is 0 (mask may be null) take no part and are never read. Returns false at the first fault: see fault, bad_pair, bad_key.
  bool run(const int32_t* raw, int64_t num_rows, int64_t active_rows, const uint8_t* mask, int32_t* out);

  Fault fault = none;
  int64_t bad_pair = -1;
  int32_t bad_key = 0;
  int width() const { return width_; }
  int out_width() const { return width_ + static_cast<int>(extra_keys_.size()); }

 private:
  Fault check_row(const int32_t* raw, const uint8_t* mask, int* column);
  void write_row(const int32_t* raw, const uint8_t* mask, int32_t* out) const;
  int width_;
  int64_t num_keys_, first_special_, end_special_;
  std::vector<int32_t> extra_keys_, scratch_;
};

// The last of `num_sums` running counts, which begin at 0 or above and never fall; -1 where they do, 0 for none.
int32_t last_sum(const int32_t* sums, int64_t num_sums);

// Places the rows of all sources whose keys lie in [first, end): ordered by key, then source, then pair (stable).
class KeySort {
 public:
  KeySort(int width, int64_t num_keys, int64_t first, int64_t end);

  // keys[s]: int32, whole rows of `width`. Returns the number of rows placed; throws Error on a key outside [-1, num_keys).
  int64_t run(const Sources& keys);

  // Keeps the number of the operation that was sorted, and this rank's own keys in it, until the next `run`.
  void remember(uint64_t sequence, const Range& own_keys);
  // That number if exactly this came of it: own keys, running counts, tags; 0 otherwise.
  uint64_t recall(const int32_t* keys, uint64_t num_keys, const int32_t* running_counts, const int32_t* tags) const;

  int64_t num_rows() const { return static_cast<int64_t>(taken_.size()); }
  // [num_local_keys, num_sources] int32: inclusive running count over keys, then sources.
  const std::vector<int32_t>& running_counts() const { return counts_; }
  // Rows per local key, or (cumulative) up to and with it.
  void write_key_counts(int64_t* out, bool cumulative) const;
  // [num_rows, 3] int32: source, row at the source, column.
  void write_tags(int32_t* out) const;
  // Copies each placed pair's data from its source. `per_pair`: the source holds one item a pair, else one a row.
  void place(const Sources& items, uint8_t* out, uint64_t out_bytes, uint64_t item_bytes, uint64_t stride, bool per_pair,
             uint64_t nt_bytes) const;

 private:
  struct Taken {
    int32_t pair, place;
  };
  void count_source(const Range& keys, int source);
  int width_;
  int64_t num_keys_, first_, end_;
  int num_sources_ = 0;
  std::vector<Taken> taken_;        // by source, then pair
  std::vector<int64_t> source_end_;  // prefix of `taken_` up to and with each source
  std::vector<int64_t> source_pairs_;
  std::vector<int32_t> counts_, next_, own_keys_;
  uint64_t sequence_ = 0;
};

// Finds where the rows of this rank's pairs lie at their owners, and lists them as terms of a sum.
class TermPlan {
 public:
  // Key k is owned by source owners[k] of the member list and is its slots[k]-th own key. `me` is this rank's number.
  TermPlan(int width, int num_weighted, int num_sources, int me, std::vector<int32_t> owners, std::vector<int32_t> slots);

  // `rest`: an owner holds rows for this rank that none of its pairs takes.
  enum Fault : int { none, key, count, tag, bounds, rest };

  struct Input {
    const int32_t* keys;      // [num_rows, width] as published by KeyCheck
    int64_t num_rows;
    const float* weights;     // [num_rows, num_weighted]; null and columns behind: 1
    const Sources* counts;    // each owner's running_counts, [its keys, num_sources]
    const Sources* tags;      // each owner's tags, or null to look at none
    const Sources* items;     // each owner's rows
    uint64_t stride, item_bytes;
  };
  // out: [num_rows, terms_per_row]; the first `width` of each row are written. False at the first fault.
  bool run(const Input& input, Term* out, int64_t terms_per_row);

  Fault fault = none;
  int64_t bad_pair = -1;
  int32_t bad_owner = -1;

 private:
  Fault start(const Input& input, int32_t key);
  Fault locate(const Input& input, int64_t pair, Term& term);
  Fault find_rest(const Input& input);
  int width_, num_weighted_, num_sources_, me_;
  std::vector<int32_t> owners_, slots_, next_, stop_;
};

}  // namespace commfuse
