// Real processes: arenas swapped over sockets, strangers turned away, killed and stopped peers, nothing left behind.
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <csignal>
#include <cstddef>
#include <cstring>
#include <ctime>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "channel.h"
#include "check.h"
#include "door.h"
#include "error.h"

using namespace commfuse;

namespace {

constexpr uint64_t kMiB = 1 << 20, kGroup = 99, kMaxBytes = 64 * kMiB;
constexpr int kMaxRanks = 4;
const std::string kToken(kTokenBytes, 't');
constexpr int64_t kSecond = 1'000'000'000;

// What the ranks' store would carry: door names and control offsets, in memory shared across fork.
struct Store {
  struct Entry {
    std::atomic<int> is_set;
    char name[64];
    uint64_t control;
  } entries[kMaxRanks];
  std::atomic<int> step;

  static std::vector<Store*>& all() {
    static std::vector<Store*> stores;
    return stores;
  }
  static Store* make() {
    void* memory = mmap(nullptr, sizeof(Store), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(memory != MAP_FAILED);
    return all().emplace_back(new (memory) Store{});
  }
  void wait_for_step(int target) {
    while (step < target) usleep(200);
  }
};

struct Rank {
  std::shared_ptr<Arena> arena = std::make_shared<Arena>(kMaxBytes, kMiB);
  std::unique_ptr<Channel> channel;
  std::vector<std::shared_ptr<Peer>> peers;
};

std::vector<std::string> names_of(Store* store, int num_ranks) {
  std::vector<std::string> names;
  for (int i = 0; i < num_ranks; i++) {
    while (!store->entries[i].is_set) usleep(200);
    names.push_back(store->entries[i].name);
  }
  return names;
}

Rank join_group(Store* store, int me, int num_ranks, const std::function<void()>& before_exchange = [] {}) {
  Rank rank;
  rank.arena->grow(4 * kMiB);
  Door door(rank.arena);
  store->entries[me].control = Channel::make_control(*rank.arena, kGroup, 256, 4);
  std::strcpy(store->entries[me].name, door.name().c_str());
  store->entries[me].is_set = 1;
  before_exchange();
  rank.peers = door.exchange(me, names_of(store, num_ranks), kToken, 20 * kSecond, nullptr);
  std::vector<uint64_t> offsets;
  for (int i = 0; i < num_ranks; i++) offsets.push_back(store->entries[i].control);
  const std::vector<std::shared_ptr<Mapping>> windows(rank.peers.begin(), rank.peers.end());
  rank.channel = std::make_unique<Channel>(rank.arena, windows, offsets, me, kGroup);
  return rank;
}

void publish_number(Rank& rank, uint64_t sequence, uint64_t number) {
  auto* words = reinterpret_cast<uint64_t*>(rank.arena->at(kMiB, 8));
  *words = number;
  Offer offer;
  offer.segments[0] = {reinterpret_cast<uint64_t>(words), 8};
  rank.channel->publish(sequence, offer);
}

void test_exchange_of_data() {
  Store* store = Store::make();
  const int num_ranks = 3;
  auto work = [&](int me) {
    Rank rank = join_group(store, me, num_ranks);
    for (uint64_t sequence = 1; sequence <= 50; sequence++) {
      CHECK(rank.channel->wait(kConsumed, sequence - 1, 20 * kSecond, true, nullptr).status == Status::ok);
      if (sequence == 25) rank.arena->grow(32 * kMiB);  // growth needs no word to anybody
      const uint64_t at = sequence >= 25 ? 20 * kMiB : kMiB;
      auto* word = reinterpret_cast<uint64_t*>(rank.arena->at(at, 8));
      *word = sequence * 10 + uint64_t(me);
      Offer offer;
      offer.segments[0] = {reinterpret_cast<uint64_t>(word), 8};
      rank.channel->publish(sequence, offer);
      CHECK(rank.channel->wait(kPublished, sequence, 20 * kSecond, true, nullptr).status == Status::ok);
      CHECK(rank.channel->resolve(sequence, offer) == -1);
      for (int i = 0; i < num_ranks; i++)
        CHECK(*reinterpret_cast<const uint64_t*>((*rank.channel->sources(0))[i].data) == sequence * 10 + uint64_t(i));
      rank.channel->advance(kConsumed, sequence);
    }
    // All must be through before anybody leaves: a peer that has left counts as dead.
    rank.channel->post(1, nullptr, 0);
    CHECK(rank.channel->wait(kPosted, 1, 20 * kSecond, true, nullptr).status == Status::ok);
    store->step++;
    store->wait_for_step(num_ranks);
  };
  const pid_t first = in_child([&] { work(1); }), second = in_child([&] { work(2); });
  work(0);
  CHECK(wait_for(first) == 0 && wait_for(second) == 0);
}

// A peer's data cannot be written by mistake: the mapping is read-only, but for its control blocks.
void test_peer_data_is_read_only() {
  Store* store = Store::make();
  const pid_t other = in_child([&] {
    Rank rank = join_group(store, 1, 2);
    store->wait_for_step(1);
  });
  Rank rank = join_group(store, 0, 2);
  const Peer& peer = *rank.peers[1];
  CHECK(peer.pid() == other && peer.alive() && !rank.peers[0]);
  CHECK(peer.at(kMiB, 8)[0] == 0);
  int pipe_fds[2];
  CHECK(pipe(pipe_fds) == 0);
  CHECK(read(pipe_fds[0], peer.base() + kMiB, 0) == 0 && write(pipe_fds[1], "x", 1) == 1);
  CHECK(read(pipe_fds[0], peer.base() + kMiB, 1) == -1 && errno == EFAULT);
  CHECK_THROWS(peer.at(4 * kMiB, 1), "do not lie in the window");
  store->step = 1;
  CHECK(wait_for(other) == 0);
}

void test_killed_peer() {
  Store* store = Store::make();
  const pid_t victim = in_child([&] {
    Rank rank = join_group(store, 1, 2);
    publish_number(rank, 1, 11);
    store->step = 1;
    for (;;) pause();
  });
  Rank rank = join_group(store, 0, 2);
  store->wait_for_step(1);
  publish_number(rank, 1, 10);
  std::thread killer([&] {
    usleep(100'000);
    kill(victim, SIGKILL);
  });
  const int64_t start = now_ns();
  CHECK(rank.channel->wait(kPublished, 1, -1, true, nullptr).status == Status::ok);
  Outcome outcome = rank.channel->wait(kPublished, 2, -1, true, nullptr);
  const int64_t noticed_ns = now_ns() - start - 100'000'000;
  killer.join();
  CHECK(outcome.status == Status::dead && outcome.member == 1 && noticed_ns < 2 * kSecond);
  CHECK(!rank.channel->alive(1));
  // What it published before it died can still be read, and its memory still be looked at.
  CHECK(rank.channel->wait(kPublished, 1, -1, true, nullptr).status == Status::ok);
  CHECK(rank.channel->resolve(1, Offer()) == -1);
  CHECK(*reinterpret_cast<const uint64_t*>((*rank.channel->sources(0))[1].data) == 11);
  CHECK(rank.channel->poison(1, 1, "rank 1 died"));
  CHECK(wait_for(victim) == -SIGKILL);
  std::printf("a killed peer was noticed after %.1f ms\n", double(noticed_ns) / 1e6);
}

void test_stopped_peer_and_poison_from_afar() {
  Store* store = Store::make();
  const pid_t sleeper = in_child([&] {
    Rank rank = join_group(store, 1, 3);
    store->step++;
    for (;;) pause();
  });
  const pid_t finder = in_child([&] {
    Rank rank = join_group(store, 2, 3);
    store->wait_for_step(2);
    const Outcome outcome = rank.channel->wait_member(1, kPublished, 1, kSecond / 5, true, nullptr);
    CHECK(outcome.status == Status::deadline && outcome.member == 1);
    CHECK(rank.channel->poison(4, 1, "rank 1 does not answer"));
    store->wait_for_step(3);
  });
  Rank rank = join_group(store, 0, 3);
  store->wait_for_step(1);
  kill(sleeper, SIGSTOP);
  store->step++;
  const Outcome outcome = rank.channel->wait(kPublished, 1, 20 * kSecond, true, nullptr);
  CHECK(outcome.status == Status::poisoned && outcome.member == 1);
  CHECK(rank.channel->cause_text() == "rank 1 does not answer" && rank.channel->cause().finder == 2);
  store->step++;
  kill(sleeper, SIGKILL);
  CHECK(wait_for(finder) == 0 && wait_for(sleeper) == -SIGKILL);
}

int connect_to(const std::string& name) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path + 1, name.data(), name.size());
  const int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  CHECK(connect(fd, reinterpret_cast<sockaddr*>(&address), socklen_t(offsetof(sockaddr_un, sun_path) + 1 + name.size())) == 0);
  return fd;
}

// Noise, silence and a wrong token at the door neither get in nor keep the right ones out.
void test_strangers() {
  Store* store = Store::make();
  const pid_t other = in_child([&] {
    Rank rank = join_group(store, 1, 2, [&] {
      const std::string name = names_of(store, 1)[0];
      connect_to(name);  // and never says a word
      const int noisy = connect_to(name);
      const std::string noise(150, 'n');
      CHECK(send(noisy, noise.data(), noise.size(), 0) == ssize_t(noise.size()));
      CHECK(recv(noisy, nullptr, 0, 0) == 0);  // shut out
      Door stranger(std::make_shared<Arena>(kMaxBytes, kMiB));
      CHECK_THROWS(stranger.exchange(1, {name, stranger.name()}, std::string(kTokenBytes, 'w'), 5 * kSecond, nullptr),
                   "rank 0 closed the connection");
    });
    store->wait_for_step(1);
  });
  Rank rank = join_group(store, 0, 2);
  CHECK(rank.peers[1] && rank.peers[1]->pid() == other);
  store->step = 1;
  CHECK(wait_for(other) == 0);
}

void test_exchange_that_fails() {
  auto arena = std::make_shared<Arena>(kMaxBytes, kMiB);
  Door door(arena);
  CHECK_THROWS(door.exchange(0, {door.name(), "x", "y"}, kToken, kSecond / 5, nullptr), "rank 1 2 did not connect in time");
  CHECK_THROWS(door.exchange(1, {"commfuse-nobody", door.name()}, kToken, kSecond, nullptr), "rank 0 cannot be reached");
  CHECK_THROWS(door.exchange(2, {door.name()}, kToken, kSecond, nullptr), "rank 2 of 1");
  CHECK_THROWS(door.exchange(0, {door.name()}, "short", kSecond, nullptr), "a token has 32 bytes");
  CHECK_THROWS(door.exchange(0, {door.name(), "x"}, kToken, -1, [] { return true; }), "interrupted");
  CHECK(door.exchange(0, {door.name()}, kToken, kSecond, nullptr).size() == 1);
}

// Two groups over the same arenas map each arena once.
void test_second_group_shares_the_mapping() {
  Store* first = Store::make();
  Store* second = Store::make();
  auto work = [&](int me) {
    Rank rank = join_group(first, me, 2);
    Door door(rank.arena);
    std::strcpy(second->entries[me].name, door.name().c_str());
    second->entries[me].is_set = 1;
    const auto peers = door.exchange(me, names_of(second, 2), kToken, 20 * kSecond, nullptr);
    CHECK(peers[size_t(1 - me)] == rank.peers[size_t(1 - me)]);
    second->step++;
    second->wait_for_step(2);
  };
  const pid_t other = in_child([&] { work(1); });
  work(0);
  CHECK(wait_for(other) == 0);
}

// After the killed and the orderly ends above: we map no window any more, and no door of these tests is open.
// Other processes of this machine may have doors of their own.
void test_nothing_is_left() {
  std::ifstream maps("/proc/self/maps"), sockets("/proc/net/unix");
  for (std::string line; std::getline(maps, line);) CHECK(line.find("memfd:commfuse") == std::string::npos);
  int num_doors = 0;
  for (std::string line; std::getline(sockets, line);)
    for (const Store* store : Store::all())
      for (const Store::Entry& entry : store->entries)
        if (entry.is_set && line.find(entry.name) != std::string::npos) num_doors++;
  CHECK(num_doors == 0 && Store::all().size() >= 6);
}

}  // namespace

int main() {
  alarm(100);  // instead of waiting for ever for a child that has failed
  test_exchange_of_data();
  test_peer_data_is_read_only();
  test_killed_peer();
  test_stopped_peer_and_poison_from_afar();
  test_strangers();
  test_exchange_that_fails();
  test_second_group_shares_the_mapping();
  test_nothing_is_left();
  std::printf("door: swapped, refused, noticed, left nothing\n");
}
