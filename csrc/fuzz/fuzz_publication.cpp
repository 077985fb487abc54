// A channel whose control blocks, the peer's and its own, have been overwritten by a peer: headers, counters, poison,
// texts, messages and sizes. Two ranks of one process; both blocks are as after their fifth operation, then altered.
#include <memory>

#include "bytes.h"
#include "channel.h"
#include "error.h"

using namespace commfuse;

namespace {

constexpr uint64_t kMiB = 1 << 20, kGroup = 5, kSequence = 5;
constexpr uint32_t kHeaderBytes = 256, kDepth = 4;
constexpr uint64_t kBlockBytes = sizeof(Control) + uint64_t(kHeaderBytes) * kDepth;
const std::vector<uint8_t> kBody = {1, 2, 3, 4, 5, 6, 7, 8};

struct Pair {
  std::shared_ptr<Arena> arenas[2];
  uint64_t offsets[2];
  std::unique_ptr<Channel> channels[2];
  std::vector<uint8_t> before[2];

  Pair() {
    for (int i : {0, 1}) {
      arenas[i] = std::make_shared<Arena>(4 * kMiB, kMiB);
      arenas[i]->grow(2 * kMiB);
      offsets[i] = Channel::make_control(*arenas[i], kGroup, kHeaderBytes, kDepth);
    }
    for (int i : {0, 1}) channels[i] = attach(i);
    for (uint64_t sequence = 1; sequence <= kSequence; sequence++)
      for (int i : {0, 1}) {
        channels[i]->publish(sequence, offer(i));
        channels[i]->advance(kConsumed, sequence - 1);
      }
    for (int i : {0, 1}) channels[i]->post(1, kBody.data(), kBody.size());
    channels[1]->poison(3, 1, "a cause");
    for (int i : {0, 1}) before[i].assign(block(i), block(i) + kBlockBytes);
  }
  std::unique_ptr<Channel> attach(int me) const {
    std::vector<std::shared_ptr<Mapping>> windows(arenas, arenas + 2);
    windows[size_t(me)] = nullptr;
    return std::make_unique<Channel>(arenas[me], windows, std::vector<uint64_t>(offsets, offsets + 2), me, kGroup);
  }
  uint8_t* block(int i) const { return arenas[i]->control_at(offsets[i], kBlockBytes); }
  Offer offer(int i) const {
    Offer result;
    result.body = kBody;
    result.agreed_bytes = uint32_t(kBody.size());
    for (auto& segment : result.segments) segment = {reinterpret_cast<uint64_t>(arenas[i]->base() + kMiB), kMiB};
    return result;
  }
};

// Where the numbers are on which something depends; the rest of a block is mostly zeros.
std::vector<size_t> make_fields() {
  const size_t record = sizeof(Control) + kSequence % kDepth * kHeaderBytes;
  std::vector<size_t> fields = {offsetof(Control, layout), offsetof(Control, group_id),   offsetof(Control, header_bytes),
                                offsetof(Control, depth),  offsetof(Control, poison),     offsetof(Control, text),
                                record,                    record + offsetof(Record, agreed_bytes),
                                record + offsetof(Record, body_bytes), record + sizeof(Record)};
  for (size_t i = 0; i < kLines; i++) fields.push_back(offsetof(Control, lines) + i * sizeof(Line));
  for (size_t i = 0; i < kSegments; i++) fields.push_back(record + offsetof(Record, segments) + i * sizeof(Segment));
  return fields;
}

// Both ends of what is given out must be there to be read: behind the file's end would be a bus error.
void read_sources(const Channel& channel) {
  volatile uint8_t sink = 0;
  for (int segment = 0; segment < kSegments; segment++)
    for (int member : {0, 1})
      if (const Range& range = channel.sources(segment)->at(member); range.num_bytes)
        sink = uint8_t(range.data[0] + range.data[range.num_bytes - 1]);
  (void)sink;
}

template <typename Use>
void attempt(const Use& use) {
  try {
    use();
  } catch (const Error&) {
  }
}

void use(Channel& channel, const Offer& offer) {
  attempt([&] {
    if (channel.resolve(kSequence, offer) == -1) read_sources(channel);
  });
  attempt([&] { channel.body(1, kSequence); });  // not longer than the headers, of which both blocks may claim any size
  attempt([&] { MUST(channel.posted(1, 1).size() == kPostBytes); });
  attempt([&] { MUST(channel.cause_text().size() <= kTextBytes); });
  attempt([&] { channel.sequence_in_slot(1, kSequence); });
  for (int line = 0; line < kLines; line++)
    attempt([&] { channel.wait(static_cast<LineIndex>(line), kSequence, 0, true, nullptr); });
  attempt([&] { channel.publish(kSequence + 1, offer); });
  attempt([&] { channel.advance(kConsumed, kSequence); });
  attempt([&] { channel.poison(2, 0, "another"); });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const Pair* pair = new Pair;
  static const std::vector<size_t> fields = make_fields();
  Bytes input(data, size);
  const bool is_new = input.take<uint8_t>() % 2, is_same = input.take<uint8_t>() % 2;
  for (int i : {1, 0}) {
    std::copy(pair->before[i].begin(), pair->before[i].end(), pair->block(i));
    Bytes copy = input;
    Bytes& from = is_same ? copy : input;
    const int max_times = from.take_in(0, 4);
    from.alter(pair->block(i), kBlockBytes, max_times, fields);
  }
  if (is_new) attempt([&] { use(*pair->attach(0), pair->offer(0)); });
  else use(*pair->channels[0], pair->offer(0));
  return 0;
}
