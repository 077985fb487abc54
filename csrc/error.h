// Exceptions of the core. Bindings turn them into Python exceptions; wait loops never throw them (they return a status).
#pragma once
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>

namespace commfuse {

static_assert(sizeof(size_t) == sizeof(uint64_t), "messages print 64-bit numbers with %zu and %zd");

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Too little memory, or a limit set by the caller. Always thrown before the pages in question are touched.
struct OutOfMemory : Error {
  using Error::Error;
};

// The caller's interrupt check said stop; the reason (a pending Python exception) is the caller's.
struct Interrupted : Error {
  Interrupted() : Error("interrupted") {}
};

__attribute__((format(printf, 1, 2))) inline std::string format(const char* pattern, ...) {
  char buffer[512];
  va_list args;
  va_start(args, pattern);
  std::vsnprintf(buffer, sizeof buffer, pattern, args);
  va_end(args);
  return buffer;
}

template <typename... Args>
[[noreturn]] void fail(const char* pattern, Args... args) {
  if constexpr (sizeof...(args) == 0) {
    throw Error(pattern);
  } else {
    char buffer[512];
    std::snprintf(buffer, sizeof buffer, pattern, args...);
    throw Error(buffer);
  }
}

}  // namespace commfuse
