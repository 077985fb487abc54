// Speed of the row kernels against memcpy and against plain reading of the same bytes, one process, one thread.
//   rows_bench [num_tokens hidden top_k [variant]]
// Medians of times and of the ratios of neighbouring runs; results are not checked here (the tests do that).
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#include <sys/mman.h>

#include "rows.h"
#include "wait.h"

using namespace commfuse;

namespace {

constexpr int kRepeats = 41;

// Filled with 16-bit numbers between about 1 and 4, as bf16 and as fp16: denormals would slow some machines down.
uint8_t* pages(uint64_t num_bytes, int seed) {
  void* memory = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  if (memory == MAP_FAILED) std::exit(1);
  std::mt19937 random(static_cast<unsigned>(seed));
  for (uint64_t i = 0; i < num_bytes / 2; i++) static_cast<uint16_t*>(memory)[i] = static_cast<uint16_t>(0x3f80 + random() % 512);
  return static_cast<uint8_t*>(memory);
}

double us(const std::function<void()>& work) {
  const int64_t start = now_ns();
  work();
  return double(now_ns() - start) / 1000;
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

volatile uint64_t sink;

#if defined(__x86_64__)
__attribute__((target_clones("default", "avx2", "arch=x86-64-v4")))
#endif
uint64_t read_all(const uint8_t* in, uint64_t num_bytes) {
  const auto* words = reinterpret_cast<const uint64_t*>(in);
  uint64_t sum = 0;
  for (uint64_t i = 0; i < num_bytes / 8; i++) sum ^= words[i];
  return sum;
}

struct Limit {
  const char* name;
  std::function<void()> work;
};

// The two in turn: what disturbs the machine then disturbs both, and the ratio of neighbours stands.
void compare(const char* name, uint64_t num_bytes, const Limit& limit, const std::function<void()>& work) {
  std::vector<double> times, ratios;
  work();
  for (int i = 0; i < kRepeats; i++) {
    const double limit_us = us(limit.work), work_us = us(work);
    times.push_back(work_us);
    ratios.push_back(work_us / limit_us);
  }
  const double best = *std::min_element(times.begin(), times.end());
  std::printf("  %-26s %9.1f us (best %9.1f) %6.1f GB/s  %6.2f x %s\n", name, median(times), best,
              double(num_bytes) / median(times) / 1000, median(ratios), limit.name);
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t num_tokens = argc > 3 ? std::atoll(argv[1]) : 128, hidden = argc > 3 ? std::atoll(argv[2]) : 7168;
  const int64_t top_k = argc > 3 ? std::atoll(argv[3]) : 8, num_rows = num_tokens * top_k;
  const uint64_t row_bytes = uint64_t(hidden) * 2, all_bytes = uint64_t(num_rows) * row_bytes;
  const uint64_t x_bytes = uint64_t(num_tokens) * row_bytes;
  const char* only = argc > 4 ? argv[4] : nullptr;
  uint8_t *x = pages(x_bytes + 64, 1), *rows = pages(all_bytes + 64, 2), *y = pages(all_bytes + 64, 3);
  uint8_t* packed = pages(all_bytes / 8 + 64, 4);
  std::vector<int32_t> order(num_rows), source(num_rows);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), std::mt19937(1));
  for (int64_t i = 0; i < num_rows; i++) source[i] = static_cast<int32_t>(i / top_k);
  std::vector<Term> terms(num_rows);
  for (int64_t i = 0; i < num_rows; i++) terms[i] = {reinterpret_cast<uint64_t>(rows) + order[i] * row_bytes, 0.125f, Term::row};
  std::vector<int8_t> q(num_rows * hidden);
  std::vector<float> scales(num_rows);
  std::printf("%zd tokens x %zd, top %zd: %.1f MB of rows\n", num_tokens, hidden, top_k,
              double(all_bytes) / 1e6);
  const Limit copy_all{"memcpy of all rows", [&] { std::memcpy(y, rows, all_bytes); }};
  const Limit copy_each{"memcpy row by row", [&] {
    for (int64_t i = 0; i < num_rows; i++) std::memcpy(y + i * row_bytes, x + source[i] * row_bytes, row_bytes);
  }};
  const Limit read_rows{"reading the rows", [&] { sink = read_all(rows, all_bytes); }};
  const Limit read_x{"reading x", [&] { sink = read_all(x, x_bytes); }};
  for (const char* name : {"plain", "avx2", "avx512"}) {
    if (!find_kernels(name) || (only && std::strcmp(only, name))) continue;
    choose_kernels(name);
    std::printf("%s\n", name);
    for (uint64_t nt : {0, 1})
      compare(nt ? "gather, past the cache" : "gather", all_bytes, copy_all, [&] {
        gather_rows(y, row_bytes, rows, all_bytes, row_bytes, order.data(), num_rows, row_bytes, nt);
      });
    for (uint64_t nt : {0, 1})
      compare(nt ? "copies of x, past the cache" : "copies of x", all_bytes, copy_each, [&] {
        gather_rows(y, row_bytes, x, x_bytes, row_bytes, source.data(), num_rows, row_bytes, nt);
      });
    for (Dtype dtype : {Dtype::bf16, Dtype::fp16})
      compare(dtype == Dtype::bf16 ? "combine bf16" : "combine fp16", all_bytes, read_rows, [&] {
        combine_rows(dtype, false, terms.data(), num_tokens, top_k, hidden, y, row_bytes);
      });
    compare("quantise bf16", x_bytes, read_x, [&] {
      quantise_rows({Dtype::bf16, hidden, num_tokens, x, row_bytes, num_tokens, nullptr, nullptr, 0, nullptr}, q.data(),
                    scales.data());
    });
    if (num_rows > 2048) continue;
    compare("pack blocks of 8, bf16", all_bytes, read_rows, [&] {
      pack_rows(Dtype::bf16, rows, num_rows, hidden, q.data(), packed);
    });
    compare("unpack blocks of 8, bf16", all_bytes, read_rows, [&] {
      unpack_rows(Dtype::bf16, q.data(), packed, num_rows, hidden, y);
    });
  }
}
