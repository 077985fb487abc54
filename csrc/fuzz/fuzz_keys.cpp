// KeySort on keys that other processes wrote, and on rows that are fewer than their keys say.
#include "bytes.h"
#include "error.h"
#include "keys.h"

using namespace commfuse;

namespace {

struct Sort {  // what KeySort is made with, and how many sources there are
  int width, num_sources;
  int64_t num_keys, first, end;
};

// Half of the sources hold keys that are mostly valid, half hold whatever the input says.
std::vector<int32_t> some_keys(Bytes& input, const Sort& sort) {
  const bool is_tame = input.take<uint8_t>() % 2;
  std::vector<int32_t> keys(size_t(input.take_in(0, 6) * sort.width));
  for (int32_t& key : keys) key = is_tame ? input.take_in(-1, std::max(int(sort.num_keys) - 1, -1)) : input.take<int32_t>();
  return keys;
}

// Rows in memory of exactly their size, so that a sanitizer sees a read behind them.
void place_items(Bytes& input, const Sort& sort, const KeySort& sorter) {
  const uint64_t item_bytes = uint64_t(input.take_in(0, 9)), stride = item_bytes + uint64_t(input.take_in(-1, 3));
  std::vector<std::vector<uint8_t>> data;
  Sources items(sort.num_sources);
  for (int source = 0; source < sort.num_sources; source++) {
    data.emplace_back(size_t(input.take_in(0, 127)));
    items.set(source, {data.back().data(), data.back().size()});
  }
  const uint64_t out_bytes = uint64_t(sorter.num_rows()) * item_bytes;
  std::vector<uint8_t> out(out_bytes - std::min<uint64_t>(out_bytes, input.take_in(0, 3) == 3));  // now and then too short
  sorter.place(items, out.data(), out.size(), item_bytes, stride, input.take<uint8_t>() % 2, 0);
}

void check_keys(const Sort& sort, const std::vector<std::vector<int32_t>>& keys) {
  for (const auto& source : keys)
    for (const int32_t key : source) MUST(key >= -1 && key < sort.num_keys);
}

void check_tags(const Sort& sort, const KeySort& sorter, const std::vector<std::vector<int32_t>>& keys) {
  std::vector<int32_t> tags(size_t(sorter.num_rows()) * 3);
  sorter.write_tags(tags.data());
  int64_t last = -1;
  for (size_t i = 0; i < tags.size(); i += 3) {
    const auto source = size_t(tags[i]), pair = size_t(tags[i + 1] * sort.width + tags[i + 2]);
    MUST(source < keys.size() && pair < keys[source].size());
    const int64_t key = keys[source][pair], order = ((key << 8) + int64_t(source)) << 8 | int64_t(pair);
    MUST(key >= sort.first && key < sort.end && order > last);
    last = order;
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes input(data, size);
  const Sort sort{input.take_in(0, 4), input.take_in(1, 4), input.take_in(0, 8), input.take_in(0, 8), input.take_in(0, 8)};
  try {
    KeySort sorter(sort.width, sort.num_keys, sort.first, sort.end);
    std::vector<std::vector<int32_t>> keys;
    Sources sources(sort.num_sources);
    for (int source = 0; source < sort.num_sources; source++) {
      keys.push_back(some_keys(input, sort));
      const size_t num_bytes = keys.back().size() * sizeof(int32_t), lost = input.take_in(0, 15) == 15;
      sources.set(source, {reinterpret_cast<const uint8_t*>(keys.back().data()), num_bytes - std::min(num_bytes, lost)});
    }
    sorter.run(sources);
    check_keys(sort, keys);
    check_tags(sort, sorter, keys);
    std::vector<int64_t> counts(size_t(sort.end - sort.first));
    sorter.write_key_counts(counts.data(), true);
    MUST(counts.empty() || counts.back() == sorter.num_rows());
    place_items(input, sort, sorter);
  } catch (const Error&) {
  }
  return 0;
}
