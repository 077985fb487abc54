// TermPlan on counts, tags and rows that their owners have altered; then the sum over whatever terms it gives out.
#include "bytes.h"
#include "error.h"
#include "keys.h"
#include "rows.h"

using namespace commfuse;

namespace {

constexpr int64_t kHidden = 3;
constexpr uint64_t kRowBytes = kHidden * sizeof(float);

template <typename T>
Range range_of(const std::vector<T>& data) {
  return {reinterpret_cast<const uint8_t*>(data.data()), data.size() * sizeof(T)};
}

struct World {
  int num_ranks, width, keys_per_rank, me;
  std::vector<std::vector<int32_t>> keys;  // by rank, rows of `width`
  // By owner, as it would publish them.
  std::vector<std::vector<int32_t>> counts, tags;
  std::vector<std::vector<float>> rows;

  int num_keys() const { return num_ranks * keys_per_rank; }
};

World honest_world(Bytes& input) {
  World world{input.take_in(1, 3), input.take_in(1, 3), input.take_in(1, 3), 0, {}, {}, {}, {}};
  world.me = input.take_in(0, world.num_ranks - 1);
  Sources keys(world.num_ranks);
  for (int rank = 0; rank < world.num_ranks; rank++) {
    world.keys.emplace_back(size_t(input.take_in(0, 4) * world.width));
    for (int32_t& key : world.keys.back()) key = input.take_in(-1, world.num_keys() - 1);
  }
  for (int rank = 0; rank < world.num_ranks; rank++) keys.set(rank, range_of(world.keys[size_t(rank)]));
  for (int owner = 0; owner < world.num_ranks; owner++) {
    KeySort sorter(world.width, world.num_keys(), owner * world.keys_per_rank, (owner + 1) * world.keys_per_rank);
    const auto num_rows = size_t(sorter.run(keys));
    world.counts.push_back(sorter.running_counts());
    world.tags.emplace_back(num_rows * 3);
    sorter.write_tags(world.tags.back().data());
    world.rows.emplace_back(num_rows * kHidden, 1.0f);
  }
  return world;
}

// Other numbers, and fewer of them. New vectors, so that a sanitizer sees a read behind the new end.
template <typename T>
void spoil(Bytes& input, std::vector<std::vector<T>>& data) {
  for (std::vector<T>& one : data) {
    const int kind = input.take_in(0, 3);
    if (kind == 1 && !one.empty()) one = std::vector<T>(one.begin(), one.end() - 1 - input.take<uint8_t>() % one.size());
    if (kind == 2) input.alter(one, 3);
  }
}

template <typename T>
Sources sources_of(const std::vector<std::vector<T>>& data) {
  Sources sources(int(data.size()));
  for (size_t i = 0; i < data.size(); i++) sources.set(int(i), range_of(data[i]));
  return sources;
}

bool lies_in_rows(const World& world, uint64_t address) {
  for (const auto& rows : world.rows) {
    const auto begin = reinterpret_cast<uint64_t>(rows.data());
    if (address >= begin && address + kRowBytes <= begin + rows.size() * sizeof(float)) return true;
  }
  return false;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes input(data, size);
  World world = honest_world(input);
  spoil(input, world.counts), spoil(input, world.tags), spoil(input, world.rows);
  std::vector<int32_t> keys = world.keys[size_t(world.me)], owners, slots;
  if (input.take_in(0, 3) == 3) input.alter(keys, 2);
  for (int key = 0; key < world.num_keys(); key++)
    owners.push_back(key / world.keys_per_rank), slots.push_back(key % world.keys_per_rank);
  const Sources counts = sources_of(world.counts), tags = sources_of(world.tags), items = sources_of(world.rows);
  TermPlan plan(world.width, world.width, world.num_ranks, world.me, owners, slots);
  TermPlan::Input what{};
  what.keys = keys.data(), what.num_rows = int64_t(keys.size()) / world.width;
  what.counts = &counts, what.items = &items, what.tags = input.take_in(0, 2) ? &tags : nullptr;
  what.stride = what.item_bytes = kRowBytes;
  std::vector<Term> terms(keys.size());
  if (!plan.run(what, terms.data(), world.width)) return 0;
  for (const Term& term : terms) MUST(term.kind == Term::nothing || lies_in_rows(world, term.address));
  std::vector<float> out(size_t(what.num_rows) * kHidden);
  auto* sums = reinterpret_cast<uint8_t*>(out.data());
  combine_rows(Dtype::f32, false, terms.data(), what.num_rows, world.width, kHidden, sums, kRowBytes);
  return 0;
}
