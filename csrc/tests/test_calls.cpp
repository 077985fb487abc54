// Slabs are not handed out while anybody may read them; calls have their places; stages come back.
#include <set>
#include <utility>

#include "calls.h"
#include "check.h"
#include "error.h"
#include "pages.h"
#include "ranks.h"

using namespace commfuse;

namespace {

struct Side {
  std::shared_ptr<Channel> channel;
  std::shared_ptr<Turnstile> turns = std::make_shared<Turnstile>();
  std::shared_ptr<Slabs> slabs;
  std::unique_ptr<Calls> calls;
};

uint64_t told_filled = 0, told_used = 0, num_told = 0;

void tell(uint64_t filled, uint64_t used) {
  told_filled = filled;
  told_used = used;
  num_told++;
}

// Two ranks in this thread; what is tested is the first one's.
std::vector<Side> two_sides() {
  const std::vector<Rank> ranks = make_ranks(2);
  std::vector<Side> sides(2);
  for (int me = 0; me < 2; me++) {
    Side& side = sides[static_cast<size_t>(me)];
    side.channel = make_channel(ranks, me);
    side.slabs = std::make_shared<Slabs>(ranks[static_cast<size_t>(me)].arena, tell);
    side.calls = std::make_unique<Calls>(side.channel, side.turns, side.slabs, kDepth);
  }
  return sides;
}

void publish(Side& side) { side.channel->publish(side.calls->begin(), {}); }

void test_sizes() {
  std::vector<Side> sides = two_sides();
  Slabs& slabs = *sides[0].slabs;
  CHECK(slabs.take(0).num_bytes == kPageBytes && slabs.take(1).num_bytes == kPageBytes);
  CHECK(slabs.take(kPageBytes + 1).num_bytes == 2 * kPageBytes);
  std::set<uint64_t> sizes;
  for (uint64_t bytes = kMiB; bytes < 2 * kMiB; bytes += 4096) {
    Slab& slab = slabs.take(bytes);
    CHECK(slab.num_bytes >= bytes && slab.num_bytes % kPageBytes == 0 && slab.num_bytes * 8 <= bytes * 9 + 8 * kPageBytes);
    sizes.insert(slab.num_bytes);
    slabs.give(slab);
  }
  CHECK(sizes.size() == 9);  // eight sizes an octave, and the next one
  CHECK_THROWS(slabs.take(~uint64_t(0)), "address space ends");
  CHECK_THROWS(slabs.take(uint64_t(1) << 60), "address space ends");
}

void test_reuse() {
  std::vector<Side> sides = two_sides();
  Slabs& slabs = *sides[0].slabs;
  Slab& first = slabs.take(100);
  slabs.give(first);
  CHECK(&slabs.take(200) == &first);
  publish(sides[0]);  // call 1 publishes it, and 2 does so again: the latest says all
  first.add_reader(sides[0].calls->reading(1));
  publish(sides[0]);
  first.add_reader(sides[0].calls->reading(2));
  CHECK(first.readers.size() == 1);
  slabs.give(first);
  CHECK(&slabs.take(100) != &first);
  sides[1].channel->advance(kConsumed, 1);
  CHECK(&slabs.take(100) != &first);
  sides[1].channel->advance(kConsumed, 2);
  CHECK(&slabs.take(100) == &first);
  // Under somebody's memory until that is returned.
  slabs.hold(first);
  CHECK(slabs.at(first.address) == &first && slabs.at(first.address + 1) == nullptr);
  std::vector<uint64_t> gone;
  slabs.returned = [&] { return std::exchange(gone, {}); };
  CHECK(&slabs.take(100) != &first);
  gone = {first.address};
  CHECK(&slabs.take(100) == &first && slabs.at(first.address) == nullptr);
  slabs.hold(first);
  slabs.let_go(first);  // it never got to be anybody's, but its address is told
  gone = {first.address};
  CHECK(&slabs.take(100) != &first);
}

// A reading of an older epoch ends when every member that took part has finished, whoever takes part now.
void test_left_out() {
  std::vector<Side> sides = two_sides();
  Slab& slab = sides[0].slabs->take(100);
  publish(sides[0]);
  slab.add_reader(sides[0].calls->reading(1));
  sides[0].channel->set_epoch(1);
  sides[0].calls->seat({0});
  CHECK(slab.in_use());
  sides[1].channel->advance(kConsumed, 1);
  CHECK(!slab.in_use());
}

void test_memory() {
  std::vector<Side> sides = two_sides();
  Slabs& slabs = *sides[0].slabs;
  const std::shared_ptr<Arena> arena = slabs.arena();
  Slab& slab = slabs.take_ready(3 * kPageBytes, 3 * kPageBytes);
  CHECK(slab.used == 3 * kPageBytes);
  slabs.give(slab);
  arena->set_limit(arena->allocated_bytes());
  CHECK_THROWS(slabs.take_ready(kMiB, kMiB), "its limit is");
  arena->set_limit(~uint64_t(0));
  CHECK(slabs.take(kMiB).used == 0);  // given back, although it could not be made ready
  // What is free makes room for what is needed.
  Slab& needless = slabs.take_ready(4 * kMiB, 4 * kMiB);
  slabs.give(needless);
  arena->set_limit(arena->allocated_bytes() + kMiB);
  Slab& needed = slabs.take_ready(2 * kMiB, 2 * kMiB);
  CHECK(needless.used == 0 && needed.used == 2 * kMiB);
  CHECK(slabs.empty_free() == false);
  slabs.give(needed);
  CHECK(slabs.empty_free() && needed.used == 0);
  arena->set_limit(~uint64_t(0));
  // Pages that somebody has filled behind the used part are given back; a large tail is told, once.
  for (int turn = 0; turn < 2; turn++) {
    Slab& large = slabs.take(80 * kMiB);
    slabs.populate(large, kPageBytes);
    arena->populate(large.offset, 70 * kMiB);
    const uint64_t filled = arena->allocated_bytes();
    slabs.give(large);
    CHECK(arena->allocated_bytes() + 69 * kMiB < filled);
  }
  CHECK(num_told == 1 && told_filled >= 69 * kMiB && told_used == kPageBytes);
}

void test_places() {
  std::vector<Side> sides = two_sides();
  Calls& calls = *sides[0].calls;
  for (uint64_t i = 1; i <= kDepth; i++) {
    CHECK(calls.in_the_way() == 0);
    CHECK(calls.begin() == i && calls.newest() == i && sides[0].turns->calls == i);
  }
  CHECK(calls.in_the_way() == 1);
  const auto consumed = [&] { return sides[0].channel->counter(0, kConsumed); };
  calls.end(2);
  CHECK(consumed() == 0);  // 1 is open
  calls.end(1);
  CHECK(consumed() == 2);
  calls.end(1);  // over already
  calls.forget();
  CHECK(calls.newest() == kDepth - 1 && sides[0].turns->calls == kDepth - 1);
  CHECK(calls.begin() == kDepth);
  calls.end(kDepth);
  CHECK_THROWS(calls.forget(), "call 4 is over");
  calls.end(3);
  CHECK(consumed() == kDepth);
  calls.begin();
  calls.restart(20);
  CHECK(calls.newest() == 20 && calls.in_the_way() == 17);  // the others may still be on their way there
  calls.end(5);
  CHECK(consumed() == kDepth);
}

void test_stages() {
  std::vector<Side> sides = two_sides();
  Calls& calls = *sides[0].calls;
  const uint64_t first = calls.stage(100);
  calls.begin();
  const uint64_t second = calls.stage(100);
  CHECK(second != first);
  calls.begin();
  sides[1].channel->advance(kConsumed, 1);
  CHECK(calls.stage(100) == first);
  calls.begin();
  sides[1].channel->advance(kConsumed, 3);
  const uint64_t larger = calls.stage(kMiB);  // in the place of one that is too small
  CHECK(larger != first && larger != second);
  calls.begin();
  CHECK(sides[0].slabs->take(100).address == first);
  calls.seat({0, 1});  // gives all up, but peers may still be reading the larger one
  CHECK(sides[0].slabs->take(kMiB).address != larger && sides[0].slabs->take(100).address == second);
  sides[1].channel->advance(kConsumed, 4);
  CHECK(sides[0].slabs->take(kMiB).address == larger);
}

void test_turnstile() {
  Turnstile turns;
  CHECK(turns.enter() && turns.is_shut() && !turns.enter());
  turns.leave();
  CHECK(turns.enter());
  turns.leave();
  CHECK(wait_for(in_child([&] { CHECK(!turns.enter() && !turns.here()); })) == 0);
}

}  // namespace

int main() {
  test_sizes();
  test_reuse();
  test_left_out();
  if (pages_are_seen("calls: memory of slabs")) test_memory();
  test_places();
  test_stages();
  test_turnstile();
  std::puts("calls: places, slabs and stages are used again when they are free");
}
