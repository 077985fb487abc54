#include "arena.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "control.h"
#include "error.h"

// Older C libraries lack names that the kernel has; values are the kernel's.
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U
#endif

namespace commfuse {
namespace {

constexpr double kMiB = 1048576.0;
constexpr uint64_t kSmall = 1 << 20;    // below this, asking how much memory there is costs more than it tells
constexpr uint64_t kReserve = 64 << 20; // left to the rest of the machine

uint64_t round_up(uint64_t value, uint64_t unit) { return (value + unit - 1) / unit * unit; }

Fd make_memfd() {
  // Sealed against shrinking: whoever maps this file may rely on every byte that it has seen.
  int fd = memfd_create("commfuse", MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL);
  if (fd < 0 && errno == EINVAL) fd = memfd_create("commfuse", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) fail("memfd_create: %s", std::strerror(errno));
  Fd owned(fd);
  if (fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_SEAL) != 0) fail("sealing a memfd: %s", std::strerror(errno));
  return owned;
}

// The fallback where the kernel cannot populate (before 5.14): allocate by the file, then map by touching each page.
// An atomic "or" with nothing leaves the content alone whatever other threads do.
int touch_pages(int fd, uint8_t* address, uint64_t offset, uint64_t num_bytes) {
  if (fallocate(fd, 0, static_cast<off_t>(offset), static_cast<off_t>(num_bytes)) != 0) return -1;
  const uint64_t page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  for (uint64_t i = 0; i < num_bytes; i += page) __atomic_fetch_or(address + i, 0, __ATOMIC_RELAXED);
  return 0;
}

int populate_pages(int fd, uint8_t* address, uint64_t offset, uint64_t num_bytes) {
  for (;;) {
    if (madvise(address, num_bytes, MADV_POPULATE_WRITE) == 0) return 0;
    if (errno == EINVAL) return touch_pages(fd, address, offset, num_bytes);
    if (errno != EAGAIN && errno != EINTR) return -1;
  }
}

}  // namespace

Mapping::Mapping(Fd fd, uint64_t max_bytes, uint64_t control_bytes, bool is_own)
    : fd_(std::move(fd)), max_bytes_(max_bytes), control_bytes_(control_bytes) {
  if (max_bytes % kPageBytes || control_bytes % kPageBytes || control_bytes == 0 || control_bytes >= max_bytes)
    fail("an arena of %zu bytes with %zu of control: both must be multiples of %zu, the first the larger",
         max_bytes, control_bytes, kPageBytes);
  // Peers get read-only pages except for the control part, where waiters announce themselves.
  const int protection = is_own ? PROT_READ | PROT_WRITE : PROT_READ;
  void* address = mmap(nullptr, max_bytes, protection, MAP_SHARED | MAP_NORESERVE, fd_.get(), 0);
  if (address == MAP_FAILED)
    fail("reserving %.0f MiB of address space for a window: %s", double(max_bytes) / kMiB, std::strerror(errno));
  base_ = static_cast<uint8_t*>(address);
  if ((!is_own && mprotect(base_, control_bytes, PROT_READ | PROT_WRITE) != 0) ||
      madvise(base_, max_bytes, MADV_DONTFORK) != 0) {
    const int error = errno;
    munmap(base_, max_bytes);
    fail("preparing a window's mapping: %s", std::strerror(error));
  }
}

Mapping::~Mapping() {
  if (born_.here()) munmap(base_, max_bytes_);  // a forked child never had the mapping; others may use its addresses
}

uint64_t Mapping::size() const {
  struct stat status;
  if (fstat(fd_.get(), &status) == 0) known_size_.store(static_cast<uint64_t>(status.st_size), std::memory_order_relaxed);
  return known_size_.load(std::memory_order_relaxed);
}

bool Mapping::holds(uint64_t offset, uint64_t num_bytes) const {
  if (offset < control_bytes_ || offset > max_bytes_ || num_bytes > max_bytes_ - offset) return false;
  const uint64_t end = offset + num_bytes;
  return end <= known_size_.load(std::memory_order_relaxed) || end <= std::min(size(), max_bytes_);
}

uint8_t* Mapping::at(uint64_t offset, uint64_t num_bytes) const {
  check_process();
  if (!holds(offset, num_bytes))
    fail("%zu bytes at offset %zu do not lie in the window (slabs: %zu to %zu)", num_bytes,
         offset, control_bytes_, size());
  return base_ + offset;
}

uint8_t* Mapping::control_at(uint64_t offset, uint64_t num_bytes) const {
  check_process();
  if (offset > control_bytes_ || num_bytes > control_bytes_ - offset || offset % kLineBytes != 0)
    fail("%zu bytes at offset %zu are no control block", num_bytes, offset);
  return base_ + offset;
}

void Mapping::prefault_read(uint64_t offset, uint64_t num_bytes) const {
  if (num_bytes == 0) return;
  const uint64_t slack = offset % kPageBytes;  // madvise wants the start of a page
  madvise(at(offset, num_bytes) - slack, num_bytes + slack, MADV_POPULATE_READ);
}

Arena::Arena(uint64_t max_bytes, uint64_t control_bytes)
    : Mapping(make_memfd(), max_bytes, control_bytes, true), limit_bytes_(max_bytes) {
  random_bytes(id_.data(), id_.size());
  grow(control_bytes);
}

void Arena::grow(uint64_t num_bytes) {
  check_process();
  std::lock_guard<std::mutex> lock(mutex_);
  const uint64_t bytes = round_up(std::min(num_bytes, max_bytes_), kPageBytes);
  if (num_bytes > max_bytes_)
    throw OutOfMemory(format("a window of %.1f MiB is needed, its address space ends at %.1f MiB", double(num_bytes) / kMiB,
                             double(max_bytes_) / kMiB));
  if (bytes <= size()) return;
  if (ftruncate(fd_.get(), static_cast<off_t>(bytes)) != 0)
    throw OutOfMemory(format("growing a window to %.1f MiB: %s", double(bytes) / kMiB, std::strerror(errno)));
  populated_.resize(bytes / kPageBytes);
  known_size_.store(bytes, std::memory_order_relaxed);
}

void Arena::populate(uint64_t offset, uint64_t num_bytes) {
  if (num_bytes == 0) return;
  at(offset, num_bytes);
  std::lock_guard<std::mutex> lock(mutex_);
  const uint64_t first = offset / kPageBytes, last = (offset + num_bytes - 1) / kPageBytes + 1;
  const auto begin = populated_.begin();
  const auto missing = static_cast<uint64_t>(std::count(begin + first, begin + last, false));
  if (missing == 0) return;
  check_room(missing * kPageBytes);
  for (uint64_t page = first; page < last;) {
    const uint64_t start = std::find(begin + page, begin + last, false) - begin;
    const uint64_t end = std::find(begin + start, begin + last, true) - begin;
    if (start < end) populate_run(start * kPageBytes, (end - start) * kPageBytes);
    page = end;
  }
}

void Arena::populate_run(uint64_t offset, uint64_t num_bytes) {
  if (populate_pages(fd_.get(), base_ + offset, offset, num_bytes) != 0)
    throw OutOfMemory(format("allocating %.1f MiB of a window: %s", double(num_bytes) / kMiB, std::strerror(errno)));
  for (uint64_t page = offset / kPageBytes; page < (offset + num_bytes) / kPageBytes; page++) populated_[page] = true;
}

// The kernel answers a lack of memory with its out-of-memory killer rather than with an error, so we ask first.
// A range may already hold part of its pages; it is counted in full, which errs towards refusing.
void Arena::check_room(uint64_t num_bytes) const {
  const uint64_t allocated = allocated_bytes(), limit = limit_bytes_;
  if (num_bytes > limit - std::min(limit, allocated))
    throw OutOfMemory(format("a window needs %.1f MiB more than the %.1f MiB it holds; its limit is %.1f MiB",
                             double(num_bytes) / kMiB, double(allocated) / kMiB, double(limit) / kMiB));
  if (num_bytes < kSmall) return;
  const uint64_t available = available_memory();
  if (available != UINT64_MAX && num_bytes + kReserve > available)
    throw OutOfMemory(format("a window needs %.1f MiB more, the machine (or its memory cgroup) has %.1f MiB left",
                             double(num_bytes) / kMiB, double(available) / kMiB));
}

void Arena::punch(uint64_t offset, uint64_t num_bytes) {
  at(offset, num_bytes);
  std::lock_guard<std::mutex> lock(mutex_);
  const uint64_t first = round_up(offset, kPageBytes), last = (offset + num_bytes) / kPageBytes * kPageBytes;
  if (first >= last) return;
  for (uint64_t page = first / kPageBytes; page < last / kPageBytes; page++) populated_[page] = false;
  if (fallocate(fd_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(first),
                static_cast<off_t>(last - first)) != 0)
    fail("giving back %.1f MiB of a window: %s", double(last - first) / kMiB, std::strerror(errno));
}

void Arena::show_to_children(uint64_t offset, uint64_t num_bytes) const {
  if (madvise(at(offset, num_bytes), num_bytes, MADV_DOFORK) != 0) fail("showing a window to children: %s", std::strerror(errno));
}

uint64_t Arena::allocated_bytes() const {
  check_process();
  struct stat status;
  if (fstat(fd_.get(), &status) != 0) fail("fstat of a window: %s", std::strerror(errno));
  return static_cast<uint64_t>(status.st_blocks) * 512;
}

uint64_t Arena::allocated_bytes(uint64_t offset, uint64_t num_bytes) const {
  at(offset, num_bytes);
  std::lock_guard<std::mutex> lock(mutex_);  // the two seeks are private to this descriptor's position
  const off_t end = static_cast<off_t>(offset + num_bytes);
  uint64_t total = 0;
  for (off_t position = static_cast<off_t>(offset); position < end;) {
    const off_t data = lseek(fd_.get(), position, SEEK_DATA);
    if (data < 0 || data >= end) break;  // ENXIO: nothing but holes from here on
    const off_t hole = std::min(lseek(fd_.get(), data, SEEK_HOLE), end);
    if (hole <= data) break;
    total += static_cast<uint64_t>(hole - data);
    position = hole;
  }
  return total;
}

uint64_t Arena::offset_of(uint64_t address, uint64_t num_bytes) const {
  check_process();
  const uint64_t offset = address - reinterpret_cast<uint64_t>(base_);  // wraps for lower addresses, then holds() is false
  if (!holds(offset, num_bytes))
    fail("%zu bytes at address %#llx do not lie in this process's window", num_bytes,
         address);
  return offset;
}

uint64_t Arena::take_control(uint64_t num_bytes) {
  check_process();
  std::lock_guard<std::mutex> lock(mutex_);
  const uint64_t bytes = round_up(num_bytes, kLineBytes);
  for (auto it = returned_.begin(); it != returned_.end(); ++it) {
    auto* control = reinterpret_cast<Control*>(base_ + it->first);
    if (it->second != bytes || control->attached.load(std::memory_order_acquire) != 0) continue;
    const uint64_t offset = it->first;
    returned_.erase(it);
    in_use_[offset] = bytes;
    std::memset(base_ + offset, 0, bytes);
    return offset;
  }
  if (bytes > control_bytes_ - control_used_)
    throw OutOfMemory(format("no room for another group's control block: %.1f MiB are in use", double(control_bytes_) / kMiB));
  const uint64_t offset = std::exchange(control_used_, control_used_ + bytes);
  in_use_[offset] = bytes;
  return offset;
}

void Arena::give_back_control(uint64_t offset) {
  if (!here()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  if (auto it = in_use_.find(offset); it != in_use_.end()) {
    returned_[it->first] = it->second;
    in_use_.erase(it);
  }
}

}  // namespace commfuse
