// Row kernels: copy, int8 quantisation, weighted sums. Their results are the same bits in every variant and on every
// machine: float32, separate multiply and add, default rounding, one NaN.
#pragma once
#include <cstdint>

namespace commfuse {

enum class Dtype : int { bf16, fp16, f32 };
inline uint64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// One summand of a row. 16 bytes, so that Python may fill arrays of them.
struct Term {
  enum Kind : uint32_t { nothing, row, f32_row };  // `row`: of the sum's own dtype
  uint64_t address = 0;
  float weight = 0;
  uint32_t kind = nothing;
};
static_assert(sizeof(Term) == 16);

// A table of the kernels of one instruction set; rows_kernels.h is compiled once for each.
struct Kernels {
  const char* name;
  // Non-temporal copy: the destination is not read and does not displace the cache. Ends with no fence.
  void (*copy_nt)(uint8_t* out, const uint8_t* in, uint64_t num_bytes);
  void (*fence)();
  // out[t] = round(sum over terms of f32(row) * weight), from +0, in the order of the terms.
  // By input dtype, then by whether the output is float32 instead of the input's dtype.
  void (*combine[3][2])(const Term* terms, int64_t num_rows, int64_t terms_per_row, int64_t hidden, uint8_t* out,
                        uint64_t out_stride);
  // out[h] = rint(f * (127 / max|f|)), f = f32(in[h]) * smooth[h]; returns 1 / (127 / max|f|).
  // No value (0), or too small ones: zeros and 0. A value that is not finite: zeros and NaN.
  float (*quantise[3])(const uint8_t* in, const float* smooth, int64_t hidden, int8_t* out);
  // int8 on the wire, in blocks of 8: scale = max * f32(1/127); q = rint(f16(x / scale)), within -128 to 127 (of denormals, whose scale is coarse, the quotient may be more).
  void (*pack[3])(const uint8_t* in, int64_t hidden, int8_t* out, uint8_t* scales);
  void (*unpack[3])(const int8_t* in, const uint8_t* scales, int64_t hidden, uint8_t* out);
};

// The best variant that this build and this CPU have, or the one chosen by name.
const Kernels& kernels();
// "avx512", "avx2", "plain", or "" for the best. Throws Error when it is not available here.
void choose_kernels(const char* name);
// Null when this build or this CPU does not have it.
const Kernels* find_kernels(const char* name);

// Rounding to nearest and honest denormals while it lives: whoever called us may have asked for others on this thread.
class DefaultFloatMode {
 public:
  DefaultFloatMode();
  ~DefaultFloatMode();
  DefaultFloatMode(const DefaultFloatMode&) = delete;
  DefaultFloatMode& operator=(const DefaultFloatMode&) = delete;

 private:
  uint64_t saved_;
};

// How rows of one operation are copied: through the cache, or past it when it could not hold them all anyway.
struct CopyRow {
  const Kernels* past_cache;  // null: through the cache
  void run(uint8_t* out, const uint8_t* in, uint64_t num_bytes) const;
  void finish() const {
    if (past_cache) past_cache->fence();
  }
};
// nt_bytes: from how many bytes in all on to copy past the cache; 0 = never.
CopyRow copy_row(uint64_t total_bytes, uint64_t nt_bytes, uint64_t row_bytes);

// out[i] = row index[i] of `in`, a row being row_bytes at a distance of `stride`; rows with index -1 are left alone.
// Throws Error, before anything is written, on an index outside [-1, in_bytes / stride).
void gather_rows(uint8_t* out, uint64_t out_stride, const uint8_t* in, uint64_t in_bytes, uint64_t stride, const int32_t* index,
                 int64_t num_rows, uint64_t row_bytes, uint64_t nt_bytes);

// Row i of the result: row in_index[i] (null: i) of `in`, times row smooth_index[i] of `smooth` (null: no factors).
// A negative index leaves row i and its scale alone. out: [num_rows, hidden]; scales: [num_rows].
struct QuantiseRows {
  Dtype dtype;
  int64_t hidden, num_rows;
  const uint8_t* in;
  uint64_t in_stride;
  int64_t in_rows;
  const int32_t* in_index;
  const float* smooth;
  int64_t smooth_rows;
  const int32_t* smooth_index;
};
void quantise_rows(const QuantiseRows& input, int8_t* out, float* scales);

void combine_rows(Dtype dtype, bool to_f32, const Term* terms, int64_t num_rows, int64_t terms_per_row, int64_t hidden,
                  uint8_t* out, uint64_t out_stride);

// Blocks of 8, the last of a row perhaps shorter; all arrays dense. scales: [num_rows, ceil(hidden / 8)] of the dtype.
void pack_rows(Dtype dtype, const uint8_t* in, int64_t num_rows, int64_t hidden, int8_t* out, uint8_t* scales);
void unpack_rows(Dtype dtype, const int8_t* in, const uint8_t* scales, int64_t num_rows, int64_t hidden, uint8_t* out);

}  // namespace commfuse
