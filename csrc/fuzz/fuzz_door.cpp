// What a stranger can say at the door, with and without descriptors. The message is a right one, then altered.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <memory>

#include "bytes.h"
#include "door.h"
#include "error.h"

using namespace commfuse;

namespace {

constexpr uint64_t kMiB = 1 << 20;
const std::string kToken(kTokenBytes, 't');
int turns_left = 0;  // of the exchange's loop

bool is_over() { return turns_left-- == 0; }

int bind_to(const std::string& name, bool listening) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path + 1, name.data(), name.size());
  const int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  const auto size = socklen_t(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  const auto* where = reinterpret_cast<const sockaddr*>(&address);
  MUST(fd >= 0 && (listening ? bind(fd, where, size) == 0 && listen(fd, 8) == 0 : connect(fd, where, size) == 0));
  return fd;
}

// What rank 1 really says: caught by a door that only listens.
std::vector<uint8_t> right_words() {
  const std::string name = "commfuse-fuzz-" + std::to_string(getpid());
  const int listener = bind_to(name, true);
  Door door(std::make_shared<Arena>(4 * kMiB, kMiB));
  turns_left = 0;
  try {
    door.exchange(1, {name, door.name()}, kToken, -1, is_over);
  } catch (const Error&) {
  }
  const int caught = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
  std::vector<uint8_t> words(1024);
  const ssize_t got = recv(caught, words.data(), words.size(), 0);
  MUST(got > 0);
  words.resize(size_t(got));
  close(caught), close(listener);
  return words;
}

int some_memory(bool is_sealed, uint64_t num_bytes) {
  const int fd = memfd_create("fuzz", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  MUST(fd >= 0 && ftruncate(fd, off_t(num_bytes)) == 0);
  if (is_sealed) MUST(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_SEAL) == 0);
  return fd;
}

std::vector<int> some_descriptors(int kind) {
  switch (kind) {
    case 0: return {};
    case 1: return {some_memory(false, 2 * kMiB)};
    case 2: return {some_memory(true, kMiB / 2)};
    case 3: return {open("/dev/null", O_RDWR | O_CLOEXEC)};
    case 4: return {some_memory(true, 2 * kMiB), some_memory(true, 2 * kMiB)};
    default: return {some_memory(true, 2 * kMiB)};
  }
}

void say(int socket, std::vector<uint8_t>& words, const std::vector<int>& fds) {
  iovec part{words.data(), words.size()};
  alignas(cmsghdr) char control[CMSG_SPACE(2 * sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (!fds.empty()) {
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(fds.size() * sizeof(int));
    cmsghdr* head = CMSG_FIRSTHDR(&message);
    head->cmsg_level = SOL_SOCKET;
    head->cmsg_type = SCM_RIGHTS;
    head->cmsg_len = CMSG_LEN(fds.size() * sizeof(int));
    std::memcpy(CMSG_DATA(head), fds.data(), fds.size() * sizeof(int));
  }
  MUST(sendmsg(socket, &message, MSG_NOSIGNAL) == ssize_t(words.size()));
  for (int fd : fds) close(fd);
}

// A peer that was let in can be asked everything.
void use(const Peer& peer) {
  peer.alive();
  for (uint64_t offset : {kMiB, 2 * kMiB - 1, ~uint64_t(0)})
    if (peer.holds(offset, 1)) MUST(peer.at(offset, 1)[0] == 0);
  MUST(peer.control_at(peer.control_bytes() - 128, 128)[127] == 0);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::vector<uint8_t> right = right_words();
  static Door* door = new Door(std::make_shared<Arena>(4 * kMiB, kMiB));
  Bytes input(data, size);
  std::vector<uint8_t> words = right;
  const int descriptors = input.take_in(0, 7), cut = input.take_in(0, 7);
  input.alter(words, input.take_in(0, 4));
  if (cut == 1) words.resize(input.take<uint8_t>() % words.size() + 1);
  if (cut == 2) words.resize(words.size() + 8);
  const int socket = bind_to(door->name(), false);
  say(socket, words, some_descriptors(descriptors));
  turns_left = 2;  // one lets it in, one hears it
  try {
    use(*door->exchange(0, {door->name(), "nobody"}, kToken, -1, is_over)[1]);
  } catch (const Error&) {
  }
  close(socket);
  return 0;
}
