// Where the members of a group keep one kind of data of the current operation: one range of bytes each.
#pragma once
#include <cstdint>
#include <vector>

#include "error.h"
#include "process.h"

namespace commfuse {

struct Range {
  const uint8_t* data = nullptr;
  uint64_t num_bytes = 0;
};

class Sources {
 public:
  explicit Sources(int num_sources) : ranges_(static_cast<size_t>(num_sources)) {}

  int size() const { return static_cast<int>(ranges_.size()); }
  const Range& operator[](int source) const { return ranges_[static_cast<size_t>(source)]; }
  void check(int source) const {
    if (source < 0 || source >= size()) fail("source %d of %d", source, size());
  }
  const Range& at(int source) const {
    check(source);
    return (*this)[source];
  }
  void set(int source, Range range) {
    check(source);
    ranges_[static_cast<size_t>(source)] = range;
  }
  void resize(int num_sources) { ranges_.assign(static_cast<size_t>(num_sources), Range()); }
  void check_process() const { born_.check("a group's data"); }

 private:
  Birthplace born_;
  std::vector<Range> ranges_;
};

}  // namespace commfuse
