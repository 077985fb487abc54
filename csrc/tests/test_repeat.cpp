// Calls in two steps against the sums they stand for, with threads as ranks.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <random>

#include "check.h"
#include "error.h"
#include "ranks.h"
#include "repeat.h"

using namespace commfuse;

namespace {

constexpr int kRanks = 3, kWidth = 2, kKeysEach = 2, kKeys = kRanks * kKeysEach;
constexpr int64_t kTokens = 5, kHidden = 16, kRoom = kRanks * kTokens * kWidth;
constexpr uint64_t kStaging = 4096, kStages = kMiB, kRows = 2 * kMiB;  // offsets in a window

float value(int rank, uint64_t round, int64_t token, int64_t column) {
  return static_cast<float>(rank * 1000 + static_cast<int>(round % 7) * 100 + token * 20 + column);
}

float weight(int rank, uint64_t round, int64_t pair) { return value(rank, round, pair, 0) + 0.5f; }

std::vector<int32_t> keys_of(int rank, uint64_t round) {
  std::mt19937 random(static_cast<unsigned>(rank * 100 + round));
  std::vector<int32_t> keys;
  for (int64_t token = 0; token < kTokens; token++) {
    const auto first = static_cast<int32_t>(random() % kKeys);
    keys.push_back(first);
    keys.push_back(static_cast<int32_t>((first + 1 + random() % (kKeys - 1)) % kKeys));
  }
  return keys;
}

// One rank of the layer, with all it needs for both calls.
struct Layer {
  Layer(const std::vector<Rank>& ranks, int rank)
      : me(rank), arena(*ranks[static_cast<size_t>(rank)].arena), channel(make_channel(ranks, rank)),
        check(kWidth, kKeys, kKeys, kKeys, {}), sort(kWidth, kKeys, rank * kKeysEach, (rank + 1) * kKeysEach),
        terms(kWidth, kWidth, kRanks, rank, owners(), slots()),
        dispatch(*channel, check, sort, {Dtype::f32, kTokens, kHidden, false, true, false, 0}),
        combine(*channel, check, terms, sort, {Dtype::f32, kTokens, kHidden, kKeysEach * kRanks, kRoom, 1}) {
    offer.agreed_bytes = 12;
    offer.body.assign(12, 1);
  }
  static std::vector<int32_t> owners() {
    std::vector<int32_t> result;
    for (int key = 0; key < kKeys; key++) result.push_back(key / kKeysEach);
    return result;
  }
  static std::vector<int32_t> slots() {
    std::vector<int32_t> result;
    for (int key = 0; key < kKeys; key++) result.push_back(key % kKeysEach);
    return result;
  }
  uint8_t* stage() { return arena.at(kStages + sequence % 4 * kStaging, kStaging); }
  // The next call: its place on the line, and its number in the header.
  void begin() {
    sequence++;
    set_number(offer, 4, sequence);
    if (sequence > kDepth) await(kConsumed, sequence - kDepth);
  }
  void await(LineIndex line, uint64_t target) {
    CHECK(channel->wait(line, target, -1, true, nullptr).status == Status::ok);
  }

  int me;
  Arena& arena;
  std::unique_ptr<Channel> channel;
  KeyCheck check;
  KeySort sort;
  TermPlan terms;
  RepeatedDispatch dispatch;
  RepeatedCombine combine;
  Offer offer;
  uint64_t sequence = 0;
  std::vector<int32_t> tags = std::vector<int32_t>(3 * kRoom), counts = std::vector<int32_t>(kKeysEach * kRanks);
  std::vector<float> weights = std::vector<float>(kRoom);
  std::vector<int64_t> key_counts = std::vector<int64_t>(kKeysEach);
};

int64_t run_dispatch(Layer& layer, uint64_t round, float* rows) {
  std::vector<float> x;
  for (int64_t token = 0; token < kTokens; token++)
    for (int64_t column = 0; column < kHidden; column++) x.push_back(value(layer.me, round, token, column));
  layer.begin();
  CHECK(layer.dispatch.staged_bytes() <= kStaging);
  const std::vector<int32_t> keys = keys_of(layer.me, round);
  std::vector<float> weights;
  for (size_t pair = 0; pair < keys.size(); pair++) weights.push_back(weight(layer.me, round, static_cast<int64_t>(pair)));
  CHECK(layer.dispatch.publish(layer.sequence, layer.offer,
                               {{keys.data()}, reinterpret_cast<const uint8_t*>(x.data()), weights.data()}, layer.stage()));
  layer.await(kPublished, layer.sequence);
  const int64_t num_rows = layer.dispatch.count(layer.sequence, layer.offer);
  layer.dispatch.place({reinterpret_cast<uint8_t*>(rows), kRoom * kHidden * 4, nullptr, 0, layer.weights.data(),
                        kRoom * 4, layer.tags.data(),
                        layer.key_counts.data(), layer.counts.data()});
  layer.channel->advance(kConsumed, layer.sequence);
  return num_rows;
}

void check_rows(const Layer& layer, uint64_t round, int64_t num_rows, const float* rows) {
  int64_t place = 0;
  for (int key = layer.me * kKeysEach; key < (layer.me + 1) * kKeysEach; key++)
    for (int rank = 0; rank < kRanks; rank++) {
      const std::vector<int32_t> keys = keys_of(rank, round);
      for (int64_t pair = 0; pair < kTokens * kWidth; pair++) {
        if (keys[static_cast<size_t>(pair)] != key) continue;
        for (int64_t column = 0; column < kHidden; column++)
          CHECK(rows[place * kHidden + column] == value(rank, round, pair / kWidth, column));
        CHECK(layer.weights[static_cast<size_t>(place)] == weight(rank, round, pair));
        const int32_t tag[3] = {rank, static_cast<int32_t>(pair / kWidth), static_cast<int32_t>(pair % kWidth)};
        CHECK(std::memcmp(&layer.tags[static_cast<size_t>(3 * place)], tag, sizeof tag) == 0);
        place++;
      }
      CHECK(layer.counts[static_cast<size_t>((key % kKeysEach) * kRanks + rank)] == place);
    }
  CHECK(place == num_rows && layer.key_counts[0] + layer.key_counts[1] == num_rows);
}

// Experts that leave the rows as they are; the weights of a token's pairs are 2 and 3.
bool run_combine(Layer& layer, uint64_t round, const float* rows, bool in_place, std::vector<float>* sums, bool is_sure = true) {
  const std::vector<float> weights = {2, 3, 2, 3, 2, 3, 2, 3, 2, 3};
  const int64_t num_rows = layer.combine.num_held(layer.counts.data());
  CHECK(num_rows >= 0 && layer.combine.staged_bytes(num_rows, in_place) <= kStaging);
  layer.begin();
  CHECK(layer.combine.publish(layer.sequence, layer.offer, num_rows,
                              {layer.counts.data(), layer.tags.data(), reinterpret_cast<const uint8_t*>(rows), in_place},
                              {keys_of(layer.me, round).data()}, layer.stage()));
  layer.await(kPublished, layer.sequence);
  const int fault = layer.combine.find(layer.sequence, layer.offer, weights.data());
  if (fault == 0) layer.combine.sum(reinterpret_cast<uint8_t*>(sums->data()));
  else layer.channel->advance(kProgress, 2 * layer.sequence + 1);
  layer.channel->advance(kConsumed, layer.sequence);
  bool differs = false;
  CHECK(layer.combine.hear(layer.sequence, -1, nullptr, &differs).status == Status::ok);
  CHECK(layer.channel->all_vouch() == is_sure);
  return !differs;
}

void test_rounds(int64_t spin_ns) {
  const std::vector<Rank> ranks = make_ranks(kRanks);
  in_threads(kRanks, [&](int me) {
    Layer layer(ranks, me);
    layer.channel->spin_ns = spin_ns;
    std::vector<float> sums(kTokens * kHidden);
    for (uint64_t round = 0; round < 60; round++) {
      // Lent rows must stay until everybody has consumed the call: two buffers in turn, and a dispatch between.
      auto* rows = reinterpret_cast<float*>(layer.arena.at(kRows + round % 2 * kMiB, kRoom * kHidden * 4));
      check_rows(layer, round, run_dispatch(layer, round, rows), rows);
      CHECK(run_combine(layer, round, rows, round % 3 != 0, &sums));
      for (int64_t token = 0; token < kTokens; token++)
        for (int64_t column = 0; column < kHidden; column++)
          CHECK(sums[static_cast<size_t>(token * kHidden + column)] == 5 * value(me, round, token, column));
    }
  });
}

void test_damage() {
  const std::vector<Rank> ranks = make_ranks(kRanks);
  in_threads(kRanks, [&](int me) {
    Layer layer(ranks, me);
    std::vector<float> sums(kTokens * kHidden);
    auto* rows = reinterpret_cast<float*>(layer.arena.at(kRows, kRoom * kHidden * 4));
    run_dispatch(layer, 0, rows);
    if (me == 0) layer.tags[1] ^= 1;  // its first row is said to be another token's: the rank that sent it finds that
    CHECK(!run_combine(layer, 0, rows, true, &sums, false));
    run_dispatch(layer, 1, rows);
    CHECK(run_combine(layer, 1, rows, true, &sums));
    // What an older dispatch gave is right, too, but nobody is sure of it any more.
    const std::vector<int32_t> tags = layer.tags, counts = layer.counts;
    run_dispatch(layer, 2, rows + kRoom * kHidden);
    CHECK(layer.tags != tags);
    layer.tags = tags;
    layer.counts = counts;
    CHECK(run_combine(layer, 1, rows, true, &sums, false));
    const std::vector<int32_t> bad(kTokens * kWidth, kKeys);
    CHECK(!layer.dispatch.publish(layer.sequence + 1, layer.offer, {{bad.data()}, nullptr, nullptr}, layer.stage()));
    CHECK(!layer.combine.publish(layer.sequence + 1, layer.offer, 0, {layer.counts.data(), nullptr, nullptr, true}, {bad.data()},
                                 layer.stage()));
    layer.counts.back() = kRoom + 1;
    CHECK(layer.combine.num_held(layer.counts.data()) == -1);
    layer.counts[0] = -1;
    CHECK(layer.combine.num_held(layer.counts.data()) == -1);
    // A rank whose header differs.
    if (me == 1) layer.offer.body[0] = 9;
    layer.begin();
    const std::vector<float> x(kTokens * kHidden);
    const std::vector<int32_t> keys = keys_of(me, 0);
    CHECK(layer.dispatch.publish(layer.sequence, layer.offer, {{keys.data()}, reinterpret_cast<const uint8_t*>(x.data()), x.data()},
                                 layer.stage()));
    layer.await(kPublished, layer.sequence);
    CHECK(layer.dispatch.count(layer.sequence, layer.offer) == -1);
    CHECK_THROWS(set_number(layer.offer, 5, 1), "a number at 5 of 12 bytes");
  });
}

}  // namespace

int main() {
  test_rounds(50000);
  test_rounds(0);
  test_damage();
  std::puts("repeat: rows there and back, damage found");
}
