// Numbers taken from a fuzzer's input, and alterations that it describes. Behind the input's end everything is zero.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

// What must hold whatever the input is.
#define MUST(condition)                                                                                   \
  do {                                                                                                    \
    if (!(condition)) {                                                                                   \
      std::fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition);                      \
      std::abort();                                                                                       \
    }                                                                                                     \
  } while (0)

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  bool empty() const { return size_ == 0; }

  template <typename T>
  T take() {
    T value{};
    const size_t num_bytes = std::min(sizeof value, size_);
    if (num_bytes) std::memcpy(&value, data_, num_bytes);
    data_ += num_bytes, size_ -= num_bytes;
    return value;
  }
  // A small number in [low, high], from one byte.
  int take_in(int low, int high) { return low + take<uint8_t>() % (high - low + 1); }

  // Overwrites pieces of `target`: where (16 bits; often one of `fields`), how many, with what.
  void alter(uint8_t* target, size_t num_bytes, int max_times, const std::vector<size_t>& fields = {}) {
    for (int i = 0; i < max_times && !empty() && num_bytes; i++) {
      const size_t place = take<uint16_t>(), length = take<uint8_t>();
      const size_t at = fields.empty() || place % 4 == 0 ? place % num_bytes : fields[place / 4 % fields.size()];
      if (length == 0xff) std::memset(target + at, take<uint8_t>(), num_bytes - at);
      else for (size_t j = 0; j <= length % 8 && at + j < num_bytes; j++) target[at + j] = take<uint8_t>();
    }
  }
  template <typename T>
  void alter(std::vector<T>& target, int max_times) {
    alter(reinterpret_cast<uint8_t*>(target.data()), target.size() * sizeof(T), max_times);
  }

 private:
  const uint8_t* data_;
  size_t size_;
};
