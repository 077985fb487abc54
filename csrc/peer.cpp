#include "peer.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <map>
#include <utility>

#include "error.h"

#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77
#endif

namespace commfuse {
namespace {

pid_t peer_pid(const Fd& socket) {
  ucred credentials{};
  socklen_t size = sizeof credentials;
  getsockopt(socket.get(), SOL_SOCKET, SO_PEERCRED, &credentials, &size);
  return credentials.pid;
}

// The socket's own pidfd names the very process that connected; opening by number could meet a successor.
Fd peer_pidfd(const Fd& socket, pid_t pid) {
  int fd = -1;
  socklen_t size = sizeof fd;
  if (getsockopt(socket.get(), SOL_SOCKET, SO_PEERPIDFD, &fd, &size) == 0 && fd >= 0) return Fd(fd);
#ifdef SYS_pidfd_open
  if (pid > 0) return Fd(static_cast<int>(syscall(SYS_pidfd_open, pid, 0)));
#endif
  return Fd();
}

bool ready(int fd, short events) {
  pollfd request{fd, events, 0};
  return poll(&request, 1, 0) > 0 && (request.revents & (events | POLLHUP | POLLERR)) != 0;
}

struct Attached {
  std::mutex mutex;
  std::map<ArenaId, std::weak_ptr<Peer>> peers;
};

Attached& attached() {
  static Attached* all = new Attached;
  return *all;
}

void forget_closed(std::map<ArenaId, std::weak_ptr<Peer>>& peers) {
  for (auto it = peers.begin(); it != peers.end();) it = it->second.expired() ? peers.erase(it) : std::next(it);
}

}  // namespace

Peer::Peer(uint64_t max_bytes, uint64_t control_bytes, Fd memory, const Fd& socket)
    : Mapping(std::move(memory), max_bytes, control_bytes, false),
      pid_(peer_pid(socket)),
      pidfd_(peer_pidfd(socket, pid_)) {}

std::shared_ptr<Peer> Peer::attach(const ArenaId& id, uint64_t max_bytes, uint64_t control_bytes, Fd memory, Fd socket) {
  const int seals = fcntl(memory.get(), F_GET_SEALS);
  if (seals < 0 || !(seals & F_SEAL_SHRINK)) fail("a peer's window is not sealed against shrinking");
  struct stat status;
  if (fstat(memory.get(), &status) != 0 || static_cast<uint64_t>(status.st_size) < control_bytes)
    fail("a peer's window is shorter than its control blocks");
  std::lock_guard<std::mutex> lock(attached().mutex);
  forget_closed(attached().peers);
  std::weak_ptr<Peer>& known = attached().peers[id];
  std::shared_ptr<Peer> peer = known.lock();
  if (!peer || !peer->here()) {
    peer = std::make_shared<Peer>(max_bytes, control_bytes, std::move(memory), socket);
    known = peer;
  }
  std::lock_guard<std::mutex> sockets_lock(peer->mutex_);
  peer->sockets_.push_back(std::move(socket));
  return peer;
}

bool Peer::alive() const noexcept {
  if (pidfd_) return !ready(pidfd_.get(), POLLIN);
  std::lock_guard<std::mutex> lock(mutex_);
  for (const Fd& socket : sockets_)
    if (!ready(socket.get(), POLLRDHUP)) return true;
  return false;
}

}  // namespace commfuse
