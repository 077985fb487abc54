// The arena of one process: growth, limits, holes, forks; and the descriptors that must not leak.
#include <dirent.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <csignal>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <set>

#include "arena.h"
#include "channel.h"
#include "check.h"
#include "error.h"
#include "pages.h"

using namespace commfuse;

namespace {

constexpr uint64_t kMiB = 1 << 20;

std::set<int> open_fds() {
  std::set<int> fds;
  DIR* folder = opendir("/proc/self/fd");
  while (const dirent* entry = readdir(folder))
    if (entry->d_name[0] != '.' && std::atoi(entry->d_name) != dirfd(folder)) fds.insert(std::atoi(entry->d_name));
  closedir(folder);
  return fds;
}

void test_growth() {
  Arena arena(256 * kMiB, kMiB);
  const uint8_t* base = arena.base();
  CHECK(arena.size() == kMiB && !arena.holds(kMiB, 1));
  CHECK_THROWS(arena.at(kMiB, 1), "do not lie in the window");
  CHECK_THROWS(arena.at(0, 1), "do not lie in the window");  // control blocks are no slabs
  arena.grow(10 * kMiB + 1);
  CHECK(arena.base() == base && arena.size() == 10 * kMiB + kPageBytes);
  std::memset(arena.at(kMiB, 3 * kMiB), 7, 3 * kMiB);
  arena.grow(2 * kMiB);  // never shrinks
  CHECK(arena.size() == 10 * kMiB + kPageBytes && arena.at(kMiB, 3 * kMiB)[3 * kMiB - 1] == 7);
  for (uint64_t offset : {uint64_t(10 * kMiB), ~uint64_t(0), ~uint64_t(0) - 10})
    CHECK_THROWS(arena.at(offset, 2 * kPageBytes), "do not lie in the window");
  CHECK_THROWS(arena.at(kMiB, ~uint64_t(0)), "do not lie in the window");
  CHECK(arena.offset_of(reinterpret_cast<uint64_t>(base) + kMiB, 4) == kMiB);
  CHECK_THROWS(arena.offset_of(reinterpret_cast<uint64_t>(&arena), 4), "do not lie in this process's window");
  CHECK_THROWS(arena.grow(257 * kMiB), "address space ends at 256.0 MiB");
}

void test_pages() {
  const uint64_t too_much = (available_memory() / kMiB + 1024) * kMiB;  // addresses cost nothing
  Arena arena(too_much + 1024 * kMiB, kMiB);
  arena.grow(arena.max_bytes());
  CHECK(arena.allocated_bytes() == 0);
  const uint64_t at = 100 * kMiB;
  arena.populate(at + 5, 3 * kMiB);
  const uint64_t held = arena.allocated_bytes();
  CHECK(held >= 3 * kMiB && held <= 3 * kMiB + 2 * kPageBytes);
  arena.populate(at + 5, 3 * kMiB);
  CHECK(arena.allocated_bytes() == held);
  std::memset(arena.at(at, kMiB), 9, kMiB);
  CHECK(arena.allocated_bytes(at, kMiB) == kMiB && arena.allocated_bytes(at + 50 * kMiB, kMiB) == 0);
  CHECK_THROWS(arena.populate(200 * kMiB, too_much), "the machine (or its memory cgroup)");
  CHECK(arena.allocated_bytes() == held);  // refused before anything was touched
  arena.set_limit(4 * kMiB);
  CHECK_THROWS(arena.populate(200 * kMiB, 2 * kMiB), "its limit is 4.0 MiB");
  arena.populate(200 * kMiB, kPageBytes);
  arena.set_limit(1 << 30);
  arena.punch(at, kMiB);
  CHECK(arena.allocated_bytes(at, kMiB) == 0 && arena.at(at, 1)[0] == 0);
  arena.populate(at, kMiB);  // again, after the hole
  CHECK(arena.allocated_bytes(at, kMiB) == kMiB);
  arena.prefault_read(at + 3, kMiB);
}

void test_control_blocks() {
  Arena arena(16 * kMiB, kMiB);
  const uint64_t one = Channel::make_control(arena, 1, 1024, 8), two = Channel::make_control(arena, 2, 1024, 8);
  CHECK(one != two);
  auto* control = reinterpret_cast<Control*>(arena.control_at(one, sizeof(Control)));
  CHECK(control->layout == kLayout && control->group_id == 1 && control->depth == 8);
  control->attached = 1;
  arena.give_back_control(one);
  CHECK(Channel::make_control(arena, 3, 1024, 8) != one);  // a peer still has it mapped and in use
  control->attached = 0;
  control->lines[kPublished].value = 5;
  CHECK(Channel::make_control(arena, 4, 1024, 8) == one);
  CHECK(control->group_id == 4 && control->lines[kPublished].value == 0);
  CHECK_THROWS(Channel::make_control(arena, 5, 1000, 8), "a multiple of 128");
  CHECK_THROWS(([&] { for (int i = 0; i < 1000; i++) Channel::make_control(arena, 6, 8192, 8); }()), "no room for another group");
}

// A forked child neither reaches the arena nor disturbs it, in use or at its exit.
void test_fork() {
  const std::set<int> before = open_fds();
  auto arena = std::make_unique<Arena>(16 * kMiB, kMiB);
  arena->grow(4 * kMiB);
  std::memset(arena->at(kMiB, 4096), 3, 4096);
  const pid_t child = in_child([&] {
    CHECK(open_fds() == before);
    CHECK_THROWS(arena->at(kMiB, 1), "forked child");
    CHECK_THROWS(arena->populate(kMiB, 1), "forked child");
    CHECK_THROWS(arena->grow(8 * kMiB), "forked child");
    // Something else may live at the arena's old addresses in the child: it must survive the arena's end.
    void* other = mmap(arena->base(), 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    CHECK(other == arena->base());
    arena.reset();
    *static_cast<volatile char*>(other) = 1;
    Arena own(16 * kMiB, kMiB);  // a child may have its own
    own.grow(2 * kMiB);
    own.at(kMiB, 1)[0] = 1;
  });
  CHECK(wait_for(child) == 0);
  CHECK(arena->at(kMiB, 4096)[4095] == 3);
  const pid_t toucher = in_child([&] { *static_cast<volatile uint8_t*>(arena->base() + kMiB) = 1; });
  CHECK(wait_for(toucher) != 0 && arena->at(kMiB, 1)[0] == 3);
  arena.reset();
  CHECK(open_fds() == before);
}

}  // namespace

int main() {
  test_growth();
  test_control_blocks();
  if (pages_are_seen("window: pages and forked children")) {
    test_pages();
    test_fork();
  }
  CHECK(available_memory() > kMiB && available_memory() != UINT64_MAX);
  std::printf("window: grows, refuses, gives back, does not leak into children\n");
}
