#include "rows.h"

#include <atomic>
#include <cfenv>
#include <cstring>

#include "error.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <xmmintrin.h>
#endif

namespace commfuse {

extern const Kernels kPlainKernels;
#ifdef COMMFUSE_HAVE_AVX2
extern const Kernels kAvx2Kernels;
#endif
#ifdef COMMFUSE_HAVE_AVX512
extern const Kernels kAvx512Kernels;
#endif

namespace {

#ifdef COMMFUSE_HAVE_AVX2
// Not every compiler's __builtin_cpu_supports knows this name.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
}
#endif

// Best first. A CPU has a variant when it has every instruction set that its file is compiled for (CMakeLists.txt).
const Kernels* available(int rank) {
#ifdef COMMFUSE_HAVE_AVX512
  if (rank == 0 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return &kAvx512Kernels;
#endif
#ifdef COMMFUSE_HAVE_AVX2
  if (rank == 1 && __builtin_cpu_supports("avx2") && has_f16c()) return &kAvx2Kernels;
#endif
  return rank == 2 ? &kPlainKernels : nullptr;
}

const Kernels* best() {
  for (int rank = 0;; rank++)
    if (const Kernels* found = available(rank)) return found;
}

std::atomic<const Kernels*> chosen{nullptr};

constexpr uint64_t kMinNtRow = 1024;  // shorter rows: the ends that must be written normally outweigh the gain

}  // namespace

const Kernels* find_kernels(const char* name) {
  for (int rank = 0; rank <= 2; rank++) {
    const Kernels* found = available(rank);
    if (found && std::strcmp(found->name, name) == 0) return found;
  }
  return nullptr;
}

const Kernels& kernels() {
  const Kernels* found = chosen.load(std::memory_order_relaxed);
  if (!found) chosen.store(found = best(), std::memory_order_relaxed);
  return *found;
}

void choose_kernels(const char* name) {
  const Kernels* found = *name ? find_kernels(name) : best();
  if (!found) fail("row kernels '%s' are not in this build or not for this CPU", name);
  chosen.store(found, std::memory_order_relaxed);
}

#if defined(__x86_64__)
DefaultFloatMode::DefaultFloatMode() : saved_(_mm_getcsr()) {
  if (saved_ != 0x1f80) _mm_setcsr(0x1f80);  // all exceptions masked, to nearest, denormals kept
}
DefaultFloatMode::~DefaultFloatMode() { _mm_setcsr(static_cast<unsigned>(saved_)); }
#elif defined(__aarch64__)
DefaultFloatMode::DefaultFloatMode() {
  asm volatile("mrs %0, fpcr" : "=r"(saved_));
  asm volatile("msr fpcr, %0" ::"r"(uint64_t{0}));
}
DefaultFloatMode::~DefaultFloatMode() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }
#else
DefaultFloatMode::DefaultFloatMode() : saved_(static_cast<uint64_t>(std::fegetround())) { std::fesetround(FE_TONEAREST); }
DefaultFloatMode::~DefaultFloatMode() { std::fesetround(static_cast<int>(saved_)); }
#endif

void CopyRow::run(uint8_t* out, const uint8_t* in, uint64_t num_bytes) const {
  if (past_cache) past_cache->copy_nt(out, in, num_bytes);
  else std::memcpy(out, in, num_bytes);
}

CopyRow copy_row(uint64_t total_bytes, uint64_t nt_bytes, uint64_t row_bytes) {
  return {nt_bytes != 0 && total_bytes >= nt_bytes && row_bytes >= kMinNtRow ? &kernels() : nullptr};
}

void gather_rows(uint8_t* out, uint64_t out_stride, const uint8_t* in, uint64_t in_bytes, uint64_t stride, const int32_t* index,
                 int64_t num_rows, uint64_t row_bytes, uint64_t nt_bytes) {
  if (row_bytes == 0 || stride < row_bytes || out_stride < row_bytes) fail("rows of %zu bytes", row_bytes);
  const int64_t in_rows = in_bytes < row_bytes ? 0 : static_cast<int64_t>((in_bytes - row_bytes) / stride) + 1;
  for (int64_t i = 0; i < num_rows; i++)
    if (index[i] < -1 || index[i] >= in_rows) fail("row %d of %zd, wanted at %zd", index[i], in_rows, i);
  const CopyRow copy = copy_row(static_cast<uint64_t>(num_rows) * row_bytes, nt_bytes, row_bytes);
  for (int64_t i = 0; i < num_rows; i++)
    if (index[i] >= 0) copy.run(out + uint64_t(i) * out_stride, in + uint64_t(index[i]) * stride, row_bytes);
  copy.finish();
}

void quantise_rows(const QuantiseRows& input, int8_t* out, float* scales) {
  const DefaultFloatMode mode;
  const auto run = kernels().quantise[static_cast<int>(input.dtype)];
  for (int64_t i = 0; i < input.num_rows; i++) {
    const int64_t row = input.in_index ? input.in_index[i] : i;
    const int64_t factors = input.smooth ? (input.smooth_index ? input.smooth_index[i] : 0) : 0;
    if (row < 0 || factors < 0) continue;
    if (row >= input.in_rows || (input.smooth && factors >= input.smooth_rows))
      fail("quantising row %zd of %zd with factors %zd of %zd", row, input.in_rows,
           factors, input.smooth_rows);
    scales[i] = run(input.in + uint64_t(row) * input.in_stride, input.smooth ? input.smooth + factors * input.hidden : nullptr,
                    input.hidden, out + i * input.hidden);
  }
}

void combine_rows(Dtype dtype, bool to_f32, const Term* terms, int64_t num_rows, int64_t terms_per_row, int64_t hidden,
                  uint8_t* out, uint64_t out_stride) {
  const DefaultFloatMode mode;
  kernels().combine[static_cast<int>(dtype)][to_f32](terms, num_rows, terms_per_row, hidden, out, out_stride);
}

void pack_rows(Dtype dtype, const uint8_t* in, int64_t num_rows, int64_t hidden, int8_t* out, uint8_t* scales) {
  const DefaultFloatMode mode;
  const uint64_t row_bytes = uint64_t(hidden) * size_of(dtype), scale_bytes = uint64_t(hidden + 7) / 8 * size_of(dtype);
  for (int64_t i = 0; i < num_rows; i++)
    kernels().pack[static_cast<int>(dtype)](in + i * row_bytes, hidden, out + i * hidden, scales + i * scale_bytes);
}

void unpack_rows(Dtype dtype, const int8_t* in, const uint8_t* scales, int64_t num_rows, int64_t hidden, uint8_t* out) {
  const DefaultFloatMode mode;
  const uint64_t row_bytes = uint64_t(hidden) * size_of(dtype), scale_bytes = uint64_t(hidden + 7) / 8 * size_of(dtype);
  for (int64_t i = 0; i < num_rows; i++)
    kernels().unpack[static_cast<int>(dtype)](in + i * hidden, scales + i * scale_bytes, hidden, out + i * row_bytes);
}

}  // namespace commfuse
