// A line of calls, with the tensors and the memory that they use.
#pragma once
#include <memory>
#include <utility>

#include "calls.h"
#include "loans.h"
#include "window_slabs.h"

namespace commfuse {

class CallLine : public Calls {
 public:
  CallLine(std::shared_ptr<Channel> channel, std::shared_ptr<Turnstile> turns, std::shared_ptr<WindowSlabs> slabs, uint64_t depth)
      : Calls(std::move(channel), std::move(turns), slabs, depth), slabs_(std::move(slabs)) {}

  WindowSlabs& slabs() { return *slabs_; }
  Loans loans;

  void take_back() {
    if (!loans.empty()) loans.take_back(channel());
  }
  void restart(uint64_t newest) {
    Calls::restart(newest);
    loans.clear();
  }
  // Whether a call can begin now, nothing to be seen to first, whoever takes part as `seating` says.
  bool is_clear(uint64_t seating) {
    const Turnstile& gate = turns();
    if (gate.seating != seating || gate.has_told_others || gate.unheard || channel().poisoned()) return false;
    if (!loans.empty()) {
      if (loans.changed()) return false;
      take_back();
    }
    return channel().all_reached(kConsumed, in_the_way());
  }

 private:
  std::shared_ptr<WindowSlabs> slabs_;
};

}  // namespace commfuse
