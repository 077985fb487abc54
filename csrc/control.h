// The control block of one rank in one group: what peers read, wait for and (poison, waiters) write.
// Laid out for two processes of different builds of the same version; `layout` is compared when a peer attaches.
#pragma once
#include <atomic>
#include <cstdint>

namespace commfuse {

// Twice a usual cache line: neighbouring lines are fetched in pairs on x86, and some aarch64 machines have 128.
constexpr uint64_t kLineBytes = 128;
constexpr uint64_t kTextBytes = 512;
constexpr uint64_t kPostBytes = 1024;
constexpr int kSegments = 6;

static_assert(std::atomic<uint64_t>::is_always_lock_free && std::atomic<uint32_t>::is_always_lock_free,
              "counters are shared between processes");

// A counter that others wait for. Written by its owner alone (kBell excepted); `waiters` by whoever sleeps on it.
struct alignas(kLineBytes) Line {
  std::atomic<uint64_t> value;
  std::atomic<uint32_t> waiters;
  std::atomic<int64_t> raised_ns;  // when, by the host's monotonic clock: how long it was awaited does not depend on who looked when
};

enum LineIndex : int {
  kPublished,  // operations whose publication can be read
  kConsumed,   // operations of which this rank has finished every read of its peers
  kPosted,     // small messages put on the board, for agreements outside operations
  kProgress,   // where this rank is, in the caller's own code; for messages about it
  kBell,       // of member 0: raised by whoever sees that all have published an operation, or poisons the group. Who waits for all of
               // them sleeps here, and is woken once
  kLines
};

struct Segment {
  uint64_t offset, num_bytes;
};

// Head of a publication in the ring; the caller's bytes follow it.
struct Record {
  uint64_t sequence;
  uint32_t agreed_bytes;  // leading bytes of the body that must be equal on all ranks
  uint32_t body_bytes;
  uint64_t vouched;  // an earlier operation whose results this one is known to be made of; 0: not known
  Segment segments[kSegments];
};

struct Control {
  uint64_t layout;    // layout_of(...), written last when the block is made
  uint64_t group_id;
  uint32_t header_bytes, depth;
  std::atomic<uint32_t> attached;  // peers that have this block in use
  Line lines[kLines];
  Line poison;  // see Poison in channel.h; 0 = none
  char text[kTextBytes];  // this rank's own words on why it poisoned the group
  uint8_t board[2][kPostBytes];
  // depth x header_bytes of publication headers follow
};
static_assert(sizeof(Control) % kLineBytes == 0);

constexpr uint64_t kLayout = 0x636f6d6d66000004;  // raise the last digits whenever a struct above changes

inline uint64_t control_size(uint32_t header_bytes, uint32_t depth) {
  return sizeof(Control) + uint64_t(header_bytes) * depth;
}

}  // namespace commfuse
