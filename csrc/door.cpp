#include "door.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <optional>
#include <utility>

#include "control.h"
#include "error.h"
#include "wait.h"

namespace commfuse {
namespace {

// One message each way; SEQPACKET keeps it whole. The arena's descriptor travels with it.
struct Hello {
  uint64_t layout = kLayout;
  uint8_t token[kTokenBytes] = {};
  ArenaId arena = {};
  uint64_t max_bytes = 0, control_bytes = 0;
  int32_t rank = 0, num_ranks = 0;
};

struct Received {
  Hello hello;
  Fd memory;
};

socklen_t abstract_address(const std::string& name, sockaddr_un& address) {
  address = {};
  address.sun_family = AF_UNIX;
  if (name.empty() || name.size() + 1 > sizeof address.sun_path) fail("'%s' is no name of a door", name.c_str());
  std::memcpy(address.sun_path + 1, name.data(), name.size());  // the leading zero byte makes it abstract
  return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
}

Fd open_socket() {
  const int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) fail("opening a unix socket: %s", std::strerror(errno));
  return Fd(fd);
}

bool same_user(const Fd& socket) {
  ucred credentials{};
  socklen_t size = sizeof credentials;
  return getsockopt(socket.get(), SOL_SOCKET, SO_PEERCRED, &credentials, &size) == 0 && credentials.uid == geteuid();
}

// In constant time: how long a refusal takes must not tell how many bytes were right.
bool same_token(const Hello& one, const Hello& other) {
  uint8_t difference = 0;
  for (size_t i = 0; i < kTokenBytes; i++) difference |= one.token[i] ^ other.token[i];
  return difference == 0;
}

bool send_hello(const Fd& socket, const Hello& hello, int memory) {
  iovec part{const_cast<Hello*>(&hello), sizeof hello};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  cmsghdr* head = CMSG_FIRSTHDR(&message);
  head->cmsg_level = SOL_SOCKET;
  head->cmsg_type = SCM_RIGHTS;
  head->cmsg_len = CMSG_LEN(sizeof(int));
  std::memcpy(CMSG_DATA(head), &memory, sizeof memory);
  return sendmsg(socket.get(), &message, MSG_NOSIGNAL) == static_cast<ssize_t>(sizeof hello);
}

// Nothing when the message is not a whole hello with one descriptor.
std::optional<Received> receive_hello(const Fd& socket) {
  Received received;
  iovec part{&received.hello, sizeof received.hello};
  alignas(cmsghdr) char control[CMSG_SPACE(4 * sizeof(int))];
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  const ssize_t got = recvmsg(socket.get(), &message, MSG_CMSG_CLOEXEC);
  if (got < 0) return std::nullopt;
  size_t num_fds = 0;
  for (cmsghdr* head = CMSG_FIRSTHDR(&message); head; head = CMSG_NXTHDR(&message, head)) {
    if (head->cmsg_level != SOL_SOCKET || head->cmsg_type != SCM_RIGHTS) continue;
    for (size_t i = 0; CMSG_LEN((i + 1) * sizeof(int)) <= head->cmsg_len; i++, num_fds++) {
      int fd;
      std::memcpy(&fd, CMSG_DATA(head) + i * sizeof fd, sizeof fd);
      received.memory = Fd(fd);  // every one is owned, so that an unwanted one is closed
    }
  }
  if (got != static_cast<ssize_t>(sizeof received.hello) || num_fds != 1) return std::nullopt;
  return received;
}

// The meeting of one rank: connects to every lower rank and lets every higher one in, in one loop around poll().
class Meeting {
 public:
  Meeting(const Arena& arena, const Fd& listener, int rank, const std::vector<std::string>& names, const std::string& token)
      : arena_(arena), listener_(listener), names_(names), peers_(names.size()) {
    if (rank < 0 || static_cast<size_t>(rank) >= names.size()) fail("rank %d of %zu", rank, names.size());
    if (token.size() != kTokenBytes) fail("a token has %zu bytes, not %zu", kTokenBytes, token.size());
    mine_.rank = rank;
    mine_.num_ranks = static_cast<int32_t>(names.size());
    mine_.arena = arena.id();
    mine_.max_bytes = arena.max_bytes();
    mine_.control_bytes = arena.control_bytes();
    std::memcpy(mine_.token, token.data(), kTokenBytes);
    for (int lower = 0; lower < rank; lower++) links_.push_back({knock(lower), lower});
  }

  std::vector<std::shared_ptr<Peer>> run(int64_t timeout_ns, bool (*interrupted)()) {
    const int64_t deadline = now_ns() + timeout_ns;
    while (missing() > 0) {
      if (interrupted && interrupted()) throw Interrupted();
      if (timeout_ns >= 0 && now_ns() > deadline) fail("%s did not connect in time", missing_ranks().c_str());
      turn();
    }
    return std::move(peers_);
  }

 private:
  struct Link {
    Fd socket;
    int rank;  // -1 until its hello has come
  };

  Fd knock(int rank) {
    sockaddr_un address;
    const socklen_t size = abstract_address(names_[static_cast<size_t>(rank)], address);
    Fd socket = open_socket();
    if (connect(socket.get(), reinterpret_cast<sockaddr*>(&address), size) != 0)
      fail("rank %d cannot be reached: %s", rank, std::strerror(errno));
    if (!same_user(socket)) fail("rank %d runs under another user", rank);
    if (!send_hello(socket, mine_, arena_.fd())) fail("rank %d cannot be greeted: %s", rank, std::strerror(errno));
    return socket;
  }

  void turn() {
    std::vector<pollfd> requests{{listener_.get(), POLLIN, 0}};
    for (const Link& link : links_) requests.push_back({link.socket.get(), POLLIN, 0});
    if (poll(requests.data(), requests.size(), 50) <= 0) return;
    std::vector<Link> open;
    for (size_t i = 0; i < links_.size(); i++) {
      if (requests[i + 1].revents == 0) open.push_back(std::move(links_[i]));
      else answer(std::move(links_[i]));
    }
    links_ = std::move(open);
    if (requests[0].revents & POLLIN) let_in();
  }

  void let_in() {
    const int fd = accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0) return;
    Link link{Fd(fd), -1};
    if (same_user(link.socket)) links_.push_back(std::move(link));
  }

  void answer(Link link) {
    std::optional<Received> received = receive_hello(link.socket);
    if (!received || !welcome(received->hello, link.rank)) {
      if (link.rank >= 0) fail("rank %d closed the connection or is not of this group", link.rank);
      return;  // a stranger
    }
    const Hello& hello = received->hello;
    if (hello.layout != kLayout) fail("rank %d runs another version of the core", hello.rank);
    if (hello.num_ranks != mine_.num_ranks)
      fail("rank %d expects %d ranks, not %d", hello.rank, hello.num_ranks, mine_.num_ranks);
    if (link.rank < 0 && !send_hello(link.socket, mine_, arena_.fd())) return;  // gone again; it shows as missing
    peers_[static_cast<size_t>(hello.rank)] =
        Peer::attach(hello.arena, hello.max_bytes, hello.control_bytes, std::move(received->memory), std::move(link.socket));
  }

  bool welcome(const Hello& hello, int expected_rank) const {
    if (!same_token(hello, mine_) || hello.rank < 0 || static_cast<size_t>(hello.rank) >= peers_.size()) return false;
    if (expected_rank >= 0) return hello.rank == expected_rank;
    return hello.rank > mine_.rank && !peers_[static_cast<size_t>(hello.rank)];
  }

  int missing() const {
    return static_cast<int>(std::count(peers_.begin(), peers_.end(), nullptr)) - 1;
  }

  std::string missing_ranks() const {
    std::string text = "rank";
    for (size_t i = 0; i < peers_.size(); i++)
      if (!peers_[i] && static_cast<int>(i) != mine_.rank) text += " " + std::to_string(i);
    return text;
  }

  const Arena& arena_;
  const Fd& listener_;
  const std::vector<std::string>& names_;
  Hello mine_;
  std::vector<Link> links_;
  std::vector<std::shared_ptr<Peer>> peers_;
};

}  // namespace

Door::Door(std::shared_ptr<Arena> arena) : arena_(std::move(arena)) {
  arena_->check_process();
  uint8_t random[16];
  random_bytes(random, sizeof random);
  name_ = "commfuse-";
  for (uint8_t byte : random) name_ += format("%02x", byte);
  listener_ = open_socket();
  sockaddr_un address;
  const socklen_t size = abstract_address(name_, address);
  if (bind(listener_.get(), reinterpret_cast<sockaddr*>(&address), size) != 0 || listen(listener_.get(), 4096) != 0)
    fail("listening on a unix socket: %s", std::strerror(errno));
}

std::vector<std::shared_ptr<Peer>> Door::exchange(int rank, const std::vector<std::string>& names, const std::string& token,
                                                  int64_t timeout_ns, bool (*interrupted)()) {
  arena_->check_process();
  return Meeting(*arena_, listener_, rank, names, token).run(timeout_ns, interrupted);
}

}  // namespace commfuse
