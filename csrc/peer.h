// A peer process of this host: its window, mapped, and whether it lives.
#pragma once
#include <sys/types.h>

#include <memory>
#include <mutex>
#include <vector>

#include "arena.h"

namespace commfuse {

class Peer : public Mapping {
 public:
  // Maps a received arena, or adds the connection to the mapping that another group has made of the same arena already.
  static std::shared_ptr<Peer> attach(const ArenaId& id, uint64_t max_bytes, uint64_t control_bytes, Fd memory, Fd socket);

  Peer(uint64_t max_bytes, uint64_t control_bytes, Fd memory, const Fd& socket);

  pid_t pid() const { return pid_; }
  // By pidfd, which also tells of zombies and of processes that are no children of ours; where pidfds are refused,
  // by the end of every connection to it. Microseconds.
  bool alive() const noexcept override;

 private:
  pid_t pid_;
  Fd pidfd_;
  mutable std::mutex mutex_;
  std::vector<Fd> sockets_;  // kept open for our own life: their end tells the peer of ours
};

}  // namespace commfuse
