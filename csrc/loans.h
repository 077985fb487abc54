// Tensors of the caller that calls have published where they lie: they must stay as they are until every peer has read them.
#pragma once
#include <nanobind/nanobind.h>

#include <cstdint>
#include <vector>

#include "channel.h"

namespace commfuse {

class Loans {
 public:
  bool empty() const { return all_.empty(); }
  // Notes that the call at `sequence` has published `tensor`, and as which version of it.
  void add(nanobind::object tensor, uint64_t sequence);
  // The call that published a tensor which has been changed since; 0: none.
  uint64_t changed() const;
  // Forgets those that every peer is known to have read: they may change again.
  void take_back(const Channel& channel);
  void clear() { all_.clear(); }

 private:
  struct Loan {
    nanobind::object tensor;
    int64_t version;
    uint64_t sequence;
  };
  std::vector<Loan> all_;
};

}  // namespace commfuse
