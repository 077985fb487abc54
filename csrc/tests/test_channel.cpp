// Counters, publications and poison, with threads as ranks over one mapping: what ThreadSanitizer can judge.
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "channel.h"
#include "check.h"
#include "error.h"
#include "ranks.h"

using namespace commfuse;

namespace {

Control* block_of(const Rank& rank) {
  return reinterpret_cast<Control*>(rank.arena->control_at(rank.control, sizeof(Control)));
}

Offer offer_of(const std::string& body, uint32_t agreed_bytes) {
  Offer offer;
  offer.body.assign(body.begin(), body.end());
  offer.agreed_bytes = agreed_bytes;
  return offer;
}

uint64_t content(int rank, uint64_t sequence, uint64_t i) { return uint64_t(rank) << 48 | sequence << 16 | i; }

// The protocol as backends use it: slabs come round again only when every rank has consumed what they held.
void run_protocol(int num_ranks, int64_t spin_ns, uint64_t num_operations) {
  constexpr uint64_t kWords = 64, kSlabs = 3;
  const std::vector<Rank> ranks = make_ranks(num_ranks);
  in_threads(num_ranks, [&](int me) {
    const auto channel = make_channel(ranks, me);
    channel->spin_ns = spin_ns;
    for (uint64_t sequence = 1; sequence <= num_operations; sequence++) {
      if (sequence > kSlabs) CHECK(channel->wait(kConsumed, sequence - kSlabs, -1, true, nullptr).status == Status::ok);
      uint8_t* slab = ranks[static_cast<size_t>(me)].arena->at(kMiB + sequence % kSlabs * kWords * 8, kWords * 8);
      for (uint64_t i = 0; i < kWords; i++) reinterpret_cast<uint64_t*>(slab)[i] = content(me, sequence, i);
      Offer offer = offer_of("agree" + std::to_string(me), 5);
      offer.segments[1] = {reinterpret_cast<uint64_t>(slab), kWords * 8};
      channel->publish(sequence, offer);
      CHECK(channel->wait(kPublished, sequence, -1, true, nullptr).status == Status::ok);
      CHECK(channel->resolve(sequence, offer) == -1);
      const Sources& found = *channel->sources(1);
      for (int rank = 0; rank < num_ranks; rank++) {
        CHECK(found[rank].num_bytes == kWords * 8);
        for (uint64_t i = 0; i < kWords; i++)
          CHECK(reinterpret_cast<const uint64_t*>(found[rank].data)[i] == content(rank, sequence, i));
        CHECK(channel->body(rank, sequence).back() == '0' + rank);
      }
      channel->advance(kConsumed, sequence);
    }
  });
}

void test_publication_rules() {
  const std::vector<Rank> ranks = make_ranks(2);
  const auto one = make_channel(ranks, 0), two = make_channel(ranks, 1);
  const Offer offer = offer_of("abc", 3);
  for (uint64_t sequence = 1; sequence <= kDepth; sequence++) one->publish(sequence, offer);
  CHECK_THROWS(one->publish(kDepth + 1, offer), "has not consumed");
  two->advance(kConsumed, 1);
  one->publish(kDepth + 1, offer);
  CHECK_THROWS(one->publish(kDepth, offer), "published already");
  CHECK_THROWS(two->advance(kConsumed, 0), "never goes back");
  CHECK_THROWS(one->publish(99, offer_of(std::string(kHeaderBytes, 'x'), 0)), "a header body");
  CHECK_THROWS(one->resolve(kDepth + 1, offer), "member 1 has not published");
  two->publish(2, offer_of("abd", 3));
  CHECK(one->resolve(2, offer) == 1);   // other bytes
  CHECK(two->resolve(2, offer_of("abd", 3)) == 0);
  CHECK(two->sequence_in_slot(0, 1 + kDepth) == 1 + kDepth && two->body(0, 2)[0] == 'a');
  one->advance(kConsumed, 5);
  two->publish(kDepth + 5, offer);  // lost count
  CHECK(one->resolve(kDepth + 1, offer) == 1);
  Offer foreign = offer;
  foreign.segments[0] = {reinterpret_cast<uint64_t>(&foreign), 4};
  CHECK_THROWS(one->publish(50, foreign), "do not lie in this process's window");
}

// A header whose segment points outside its owner's window must not be followed.
void test_forged_segment() {
  const std::vector<Rank> ranks = make_ranks(2);
  const auto one = make_channel(ranks, 0), two = make_channel(ranks, 1);
  Offer offer = offer_of("abc", 3);
  offer.segments[0] = {reinterpret_cast<uint64_t>(ranks[0].arena->base() + kMiB), 64};
  one->publish(1, offer);
  offer.segments[0].address = reinterpret_cast<uint64_t>(ranks[1].arena->base() + kMiB);
  two->publish(1, offer);
  CHECK(one->resolve(1, offer) == -1 && one->sources(0)->operator[](1).num_bytes == 64);
  auto* record = reinterpret_cast<Record*>(reinterpret_cast<uint8_t*>(block_of(ranks[1]) + 1) + 1 % kDepth * kHeaderBytes);
  for (const Segment& forged : {Segment{kMiB, 1ull << 40}, Segment{~0ull, 2}, Segment{0, 64}, Segment{17 * kMiB, 1}}) {
    record->segments[0] = forged;
    CHECK_THROWS(one->resolve(1, offer), "do not lie in the window");
  }
  record->segments[0] = {kMiB, 64};
  record->body_bytes = ~0u;
  CHECK(one->resolve(1, offer) == 1);
  record->agreed_bytes = ~0u;
  CHECK(one->resolve(1, offer) == 1);
  CHECK(one->body(1, 1).size() < kHeaderBytes);
}

// A block that is none, or whose sizes its peers have overwritten, is refused, and nobody counts as attached to anything.
void test_forged_block() {
  const std::vector<Rank> ranks = make_ranks(3);
  const struct {
    uint32_t header_bytes, depth;
    const char* words;
  } forgeries[] = {{kHeaderBytes, 0, "0 deep"},     {kHeaderBytes, ~0u, "deep"},           {0, kDepth, "headers of 0 bytes"},
                   {100, kDepth, "headers of 100"}, {1u << 20, 1024, "no control block"}, {kHeaderBytes, kDepth + 1, "another size"}};
  for (const size_t forged : {0, 2})
    for (const auto& forgery : forgeries) {
      block_of(ranks[forged])->header_bytes = forgery.header_bytes;
      block_of(ranks[forged])->depth = forgery.depth;
      CHECK_THROWS(make_channel(ranks, 0), forgery.words);
      block_of(ranks[forged])->header_bytes = kHeaderBytes;
      block_of(ranks[forged])->depth = kDepth;
    }
  block_of(ranks[2])->layout++;
  CHECK_THROWS(make_channel(ranks, 0), "member 2 has no control block");
  CHECK(block_of(ranks[1])->attached == 0);
}

void test_waits_end() {
  const std::vector<Rank> ranks = make_ranks(3);
  const auto one = make_channel(ranks, 0), two = make_channel(ranks, 1), three = make_channel(ranks, 2);
  const int64_t start = now_ns();
  Outcome outcome = one->wait(kPublished, 1, 30000000, true, nullptr);
  CHECK(outcome.status == Status::deadline && outcome.member == 1 && now_ns() - start < 1000000000);
  CHECK(one->wait(kPublished, 1, 0, true, nullptr).status == Status::deadline);
  two->publish(1, Offer());
  outcome = one->wait(kPublished, 1, 10000000, true, nullptr);
  CHECK(outcome.status == Status::deadline && outcome.member == 2);
  CHECK(one->wait_member(1, kPublished, 1, 0, true, nullptr).status == Status::ok);
  one->set_active({1, 0});
  CHECK(one->wait(kPublished, 1, 0, true, nullptr).status == Status::ok);
  const uint64_t waited = one->waited_ns()[1];
  CHECK(one->wait(kPublished, 1, 0, true, nullptr).status == Status::ok && one->waited_ns()[1] == waited);  // it had come before
  CHECK_THROWS(one->set_active({1, 2}), "must contain this one");
  CHECK_THROWS(one->set_active({0, 3}), "member 3 of 3");
  one->set_active({0, 1, 2});
  outcome = one->wait(kPublished, 1, -1, true, [] { return true; });
  CHECK(outcome.status == Status::interrupted);
}

bool is_asleep(pid_t tid) {
  std::ifstream stat("/proc/self/task/" + std::to_string(tid) + "/stat");
  const std::string text((std::istreambuf_iterator<char>(stat)), std::istreambuf_iterator<char>());
  const size_t name_end = text.rfind(')');
  return name_end != std::string::npos && text[name_end + 2] == 'S';
}

// A sleeper is woken by what it waits for, and by poison, at once and not at the end of its slice; whichever member it is.
void test_sleepers_are_woken() {
  for (size_t sleeper : {0, 1})
    for (bool do_poison : {false, true}) {
      const std::vector<Rank> ranks = make_ranks(2);
      const std::unique_ptr<Channel> channels[] = {make_channel(ranks, 0), make_channel(ranks, 1)};
      Channel &asleep = *channels[sleeper], &other = *channels[1 - sleeper];
      asleep.spin_ns = 0;
      asleep.slice_ns = 20'000'000'000;
      Outcome outcome;
      std::atomic<pid_t> tid{0};
      std::thread thread([&] {
        tid = gettid();
        outcome = asleep.wait(kPublished, do_poison ? 9 : 1, -1, true, nullptr);
      });
      while (block_of(ranks[1 - sleeper])->lines[kPublished].waiters == 0) std::this_thread::yield();
      while (!is_asleep(tid)) std::this_thread::yield();  // between its look at the poison and its sleep a nudge is lost, for a slice
      const int64_t start = now_ns();
      if (do_poison) CHECK(other.poison(5, 1, "because"));
      else other.publish(1, Offer());
      thread.join();
      CHECK(outcome.status == (do_poison ? Status::poisoned : Status::ok));
      CHECK(now_ns() - start < 10'000'000'000);
    }
}

// Who has published itself sleeps until the last one has: once, on member 0's bell, and poison wakes it there too.
void test_the_last_one_rings() {
  for (const size_t sleeper : {0, 1, 2})
    for (const bool do_poison : {false, true}) {
      const std::vector<Rank> ranks = make_ranks(3);
      const std::unique_ptr<Channel> channels[] = {make_channel(ranks, 0), make_channel(ranks, 1), make_channel(ranks, 2)};
      Channel &asleep = *channels[sleeper], &next = *channels[(sleeper + 1) % 3], &last = *channels[(sleeper + 2) % 3];
      const Line& bell = block_of(ranks[0])->lines[kBell];
      asleep.spin_ns = 0;
      asleep.slice_ns = 20'000'000'000;
      asleep.publish(1, Offer());
      Outcome outcome;
      const int64_t start = now_ns();
      std::thread thread([&] { outcome = asleep.wait(kPublished, 1, -1, true, nullptr); });
      while (bell.waiters == 0) std::this_thread::yield();
      next.publish(1, Offer());
      CHECK(bell.value == 0 && bell.waiters == 1);
      const int64_t next_came = now_ns();
      if (do_poison) CHECK(last.poison(5, 1, "because"));
      else last.publish(1, Offer());
      thread.join();
      CHECK(outcome.status == (do_poison ? Status::poisoned : Status::ok) && bell.value == 1);
      const int64_t end = now_ns();
      CHECK(end - start < 10'000'000'000);
      if (do_poison) continue;
      // However late this rank looked: what counts is when each of them came.
      const uint64_t for_next = asleep.waited_ns()[(sleeper + 1) % 3], for_last = asleep.waited_ns()[(sleeper + 2) % 3];
      CHECK(for_next <= static_cast<uint64_t>(next_came - start) && for_last >= for_next);
      CHECK(for_last <= static_cast<uint64_t>(end - start));
    }
}

// Two publish last at the same moment, again and again: one of them at least sees it, and nobody sleeps on.
void test_the_bell_is_never_missed() {
  const int num_ranks = 3;
  const std::vector<Rank> ranks = make_ranks(num_ranks);
  const int64_t start = now_ns();
  in_threads(num_ranks, [&](int me) {
    const auto channel = make_channel(ranks, me);
    channel->spin_ns = 0;
    channel->slice_ns = 20'000'000'000;
    for (uint64_t sequence = 1; sequence <= 3000; sequence++) {
      channel->wait(kConsumed, sequence > kDepth ? sequence - kDepth : 0, -1, true, nullptr);
      channel->publish(sequence, Offer());
      CHECK(channel->wait(kPublished, sequence, -1, true, nullptr).status == Status::ok);
      channel->advance(kConsumed, sequence);
    }
  });
  CHECK(now_ns() - start < 15'000'000'000);
}

// All ranks give up at the same moment, again and again in new epochs: all must tell the same cause.
void test_one_cause_wins() {
  const int num_ranks = 3;
  const std::vector<Rank> ranks = make_ranks(num_ranks);
  std::vector<std::unique_ptr<Channel>> channels;
  for (int me = 0; me < num_ranks; me++) channels.push_back(make_channel(ranks, me));
  for (uint16_t epoch = 1; epoch <= 300; epoch++) {
    for (const auto& channel : channels) channel->set_epoch(epoch);
    for (const auto& channel : channels) CHECK(!channel->poisoned());  // what an older epoch died of is over
    std::atomic<int> num_ready{0}, num_first{0};
    in_threads(num_ranks, [&](int me) {
      for (num_ready++; num_ready < num_ranks;) std::this_thread::yield();
      num_first += channels[size_t(me)]->poison(7, uint16_t(me), "from " + std::to_string(me));
      CHECK(channels[size_t(me)]->poisoned());
    });
    CHECK(num_first == 1);
    const Poison cause = channels[0]->cause();
    CHECK(cause.epoch == epoch && cause.code == 7 && cause.subject == cause.finder);
    for (const auto& channel : channels) {
      CHECK(channel->cause().pack() == cause.pack());
      CHECK(channel->cause_text() == "from " + std::to_string(cause.finder));
      CHECK(!channel->poison(8, 0, "too late") && channel->cause().code == 7);
    }
  }
}

void test_posts() {
  const std::vector<Rank> ranks = make_ranks(3);
  in_threads(3, [&](int me) {
    const auto channel = make_channel(ranks, me);
    for (uint64_t round = 1; round <= 200; round++) {
      const std::string text = std::to_string(me) + ":" + std::to_string(round);
      channel->post(round, reinterpret_cast<const uint8_t*>(text.data()), text.size());
      CHECK(channel->wait(kPosted, round, -1, false, nullptr).status == Status::ok);
      for (int other = 0; other < 3; other++) {
        const std::vector<uint8_t> seen = channel->posted(other, round);
        CHECK(std::string(reinterpret_cast<const char*>(seen.data())) == std::to_string(other) + ":" + std::to_string(round));
      }
    }
    CHECK_THROWS(channel->posted(me, 999), "has not posted");
    const std::vector<uint8_t> big(kPostBytes + 1);
    CHECK_THROWS(channel->post(201, big.data(), big.size()), "at most");
  });
}

}  // namespace

int main() {
  for (int num_ranks : {1, 2, 3})
    for (int64_t spin_ns : {0, 50000}) run_protocol(num_ranks, spin_ns, 400);
  test_publication_rules();
  test_forged_segment();
  test_forged_block();
  test_waits_end();
  test_sleepers_are_woken();
  test_the_last_one_rings();
  test_the_bell_is_never_missed();
  test_one_cause_wins();
  test_posts();
  std::printf("channel: published, consumed, poisoned, woken\n");
}
