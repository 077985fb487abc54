#include "process.h"

#include <pthread.h>
#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "error.h"

namespace commfuse {
namespace {

std::atomic<uint64_t> generation{0};

// Never destroyed: descriptors may be closed by objects that outlive this file's static storage.
struct OpenFds {
  std::mutex mutex;
  std::vector<int> fds;
};

OpenFds& open_fds() {
  static OpenFds* all = new OpenFds;
  return *all;
}

void before_fork() { open_fds().mutex.lock(); }
void after_fork_parent() { open_fds().mutex.unlock(); }
void after_fork_child() {
  generation.fetch_add(1, std::memory_order_relaxed);
  for (int fd : open_fds().fds) ::close(fd);
  open_fds().fds.clear();
  open_fds().mutex.unlock();
}

void watch_forks() {
  static const int registered = pthread_atfork(before_fork, after_fork_parent, after_fork_child);
  if (registered != 0) throw OutOfMemory("cannot register the fork handlers");
}

// First number of a small text file; "max" and absent files give UINT64_MAX.
uint64_t read_number(const std::string& path, const char* key = nullptr) {
  std::ifstream file(path);
  std::string word;
  if (key) {
    while (file >> word) {
      if (word == key) break;
      file.ignore(4096, '\n');
    }
  }
  uint64_t value = 0;
  return file >> value ? value : UINT64_MAX;
}

struct CgroupFiles {
  const char *root, *limit, *usage, *reclaimable;
};
constexpr CgroupFiles kVersion1{"/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
                                "total_inactive_file"};
constexpr CgroupFiles kVersion2{"/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"};

uint64_t cgroup_room(const CgroupFiles& files, std::string path) {
  uint64_t room = UINT64_MAX;
  for (;;) {
    const std::string folder = files.root + path + "/";
    const uint64_t limit = read_number(folder + files.limit), usage = read_number(folder + files.usage);
    if (limit != UINT64_MAX && usage != UINT64_MAX) {
      const uint64_t cache = read_number(folder + "memory.stat", files.reclaimable);
      const uint64_t used = usage - std::min(usage, cache == UINT64_MAX ? 0 : cache);
      room = std::min(room, limit - std::min(limit, used));
    }
    const size_t slash = path.rfind('/');
    if (path.empty() || slash == std::string::npos) return room;
    path.resize(slash);
  }
}

uint64_t cgroups_room() {
  std::ifstream file("/proc/self/cgroup");
  uint64_t room = UINT64_MAX;
  for (std::string line; std::getline(file, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    std::string path = line.substr(second + 1);
    if (path == "/") path.clear();
    if (controllers.empty()) room = std::min(room, cgroup_room(kVersion2, path));
    if (controllers == "memory") room = std::min(room, cgroup_room(kVersion1, path));
  }
  return room;
}

}  // namespace

uint64_t fork_generation() noexcept { return generation.load(std::memory_order_relaxed); }

void Birthplace::check(const char* what) const {
  if (!here()) fail("%s belongs to the process that made it; this forked child must make its own", what);
}

Fd::Fd(int fd) : fd_(fd) {
  watch_forks();
  std::lock_guard<std::mutex> lock(open_fds().mutex);
  if (fd_ >= 0) open_fds().fds.push_back(fd_);
}

Fd::Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)), born_(other.born_) {}

Fd& Fd::operator=(Fd&& other) noexcept {
  if (this != &other) {
    close();
    fd_ = std::exchange(other.fd_, -1);
    born_ = other.born_;
  }
  return *this;
}

Fd::~Fd() { close(); }

void Fd::close() noexcept {
  if (fd_ < 0 || !born_.here()) return;  // in a child the number may already belong to somebody else
  std::lock_guard<std::mutex> lock(open_fds().mutex);
  auto& fds = open_fds().fds;
  fds.erase(std::remove(fds.begin(), fds.end(), fd_), fds.end());
  ::close(std::exchange(fd_, -1));
}

uint64_t available_memory() {
  const uint64_t kib = read_number("/proc/meminfo", "MemAvailable:");
  return std::min(kib == UINT64_MAX ? kib : kib * 1024, cgroups_room());
}

void random_bytes(void* out, uint64_t num_bytes) {
  auto* bytes = static_cast<uint8_t*>(out);
  while (num_bytes > 0) {
    const ssize_t got = getrandom(bytes, num_bytes, 0);
    if (got < 0 && errno != EINTR) fail("getrandom: %s", std::strerror(errno));
    if (got > 0) bytes += got, num_bytes -= static_cast<uint64_t>(got);
  }
}

}  // namespace commfuse
