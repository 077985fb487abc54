// Meeting the other ranks of a group on this host: every pair swaps its arenas' descriptors over one unix socket.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "peer.h"

namespace commfuse {

constexpr size_t kTokenBytes = 32;

class Door {
 public:
  // Listens on a fresh abstract address: no file, gone with the process.
  explicit Door(std::shared_ptr<Arena> arena);

  // To be made known to the other ranks, by whatever store the group has.
  const std::string& name() const { return name_; }

  // Swaps arenas with all other ranks. `names[i]` is the door of rank i, `token` a secret that only the group's ranks
  // know. Only processes of the same user that show the token are let in; others are turned away without harm.
  // Returns one peer for each rank, null for `rank` itself. Throws Error naming the ranks that did not come.
  std::vector<std::shared_ptr<Peer>> exchange(int rank, const std::vector<std::string>& names, const std::string& token,
                                              int64_t timeout_ns, bool (*interrupted)());

 private:
  std::shared_ptr<Arena> arena_;
  std::string name_;
  Fd listener_;
};

}  // namespace commfuse
