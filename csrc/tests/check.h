// What the core's tests need: a check that says where, an exception that must come, and processes that are waited for.
#pragma once
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>

#define CHECK(condition)                                                              \
  do {                                                                                \
    if (!(condition)) {                                                               \
      std::fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition);  \
      std::exit(1);                                                                   \
    }                                                                                 \
  } while (0)

#define CHECK_THROWS(expression, words)                                                                       \
  do {                                                                                                        \
    std::string said = "(nothing)";                                                                           \
    try {                                                                                                     \
      (void)(expression);                                                                                     \
    } catch (const commfuse::Error& error) {                                                                  \
      said = error.what();                                                                                    \
    }                                                                                                         \
    if (said.find(words) == std::string::npos) {                                                              \
      std::fprintf(stderr, "%s:%d: %s threw '%s'\n", __FILE__, __LINE__, #expression, said.c_str());          \
      std::exit(1);                                                                                           \
    }                                                                                                         \
  } while (0)

// Runs work in a forked child that ends without destructors, as a killed process would; returns its pid.
inline pid_t in_child(const std::function<void()>& work) {
  std::fflush(nullptr);
  const pid_t pid = fork();
  if (pid == 0) {
    work();
    std::fflush(nullptr);
    _exit(0);
  }
  CHECK(pid > 0);
  return pid;
}

inline int wait_for(pid_t pid) {
  int status = 0;
  CHECK(waitpid(pid, &status, 0) == pid);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}
