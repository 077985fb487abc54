// Ranks of a test: threads of one process, each with a window, over the same mapping, so that a sanitizer sees both sides.
#pragma once
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "channel.h"

namespace commfuse {

constexpr uint64_t kMiB = 1 << 20, kGroup = 77;
constexpr uint32_t kHeaderBytes = 256, kDepth = 4;

struct Rank {
  std::shared_ptr<Arena> arena = std::make_shared<Arena>(256 * kMiB, kMiB);
  uint64_t control = Channel::make_control(*arena, kGroup, kHeaderBytes, kDepth);
};

inline std::vector<Rank> make_ranks(int num_ranks) {
  std::vector<Rank> ranks(static_cast<size_t>(num_ranks));
  for (Rank& rank : ranks) rank.arena->grow(16 * kMiB);
  return ranks;
}

inline std::unique_ptr<Channel> make_channel(const std::vector<Rank>& ranks, int me) {
  std::vector<std::shared_ptr<Mapping>> windows;
  std::vector<uint64_t> offsets;
  for (const Rank& rank : ranks) {
    windows.push_back(&rank == &ranks[static_cast<size_t>(me)] ? nullptr : rank.arena);
    offsets.push_back(rank.control);
  }
  return std::make_unique<Channel>(ranks[static_cast<size_t>(me)].arena, windows, offsets, me, kGroup);
}

inline void in_threads(int num_ranks, const std::function<void(int)>& work) {
  std::vector<std::thread> threads;
  for (int me = 0; me < num_ranks; me++) threads.emplace_back(work, me);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace commfuse
