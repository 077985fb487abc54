#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/vector.h>

#include "bind.h"
#include "keys.h"
#include "rows.h"

#include <cstring>

namespace nb = nanobind;
using namespace nb::literals;

namespace commfuse {
namespace {

using NoGil = nb::call_guard<nb::gil_scoped_release>;

Dtype dtype_of(int dtype) {
  if (dtype < 0 || dtype > 2) fail("row dtype %d: 0 bf16, 1 fp16, 2 float32", dtype);
  return static_cast<Dtype>(dtype);
}

void not_negative(int64_t value, const char* what) {
  if (value < 0) fail("%s: %zd", what, value);
}

void copy(uint64_t out, uint64_t in, uint64_t num_bytes, uint64_t nt_bytes) {
  const CopyRow row = copy_row(num_bytes, nt_bytes, num_bytes);
  if (num_bytes) row.run(pointer<uint8_t>(out), pointer<const uint8_t>(in), num_bytes);
  row.finish();
}

void gather(uint64_t out, uint64_t out_stride, uint64_t in, uint64_t in_bytes, uint64_t stride, uint64_t index, int64_t num_rows,
            uint64_t row_bytes, uint64_t nt_bytes) {
  not_negative(num_rows, "rows");
  gather_rows(pointer<uint8_t>(out), out_stride, pointer<const uint8_t>(in), in_bytes, stride, pointer<const int32_t>(index),
              num_rows, row_bytes, nt_bytes);
}

void quantise(int dtype, int64_t hidden, int64_t num_rows, uint64_t in, uint64_t in_stride, int64_t in_rows, uint64_t out,
              uint64_t scales, uint64_t in_index, uint64_t smooth, int64_t smooth_rows, uint64_t smooth_index) {
  not_negative(hidden, "hidden size");
  quantise_rows({dtype_of(dtype), hidden, num_rows, pointer<const uint8_t>(in), in_stride, in_rows,
                 pointer<const int32_t>(in_index), pointer<const float>(smooth), smooth_rows, pointer<const int32_t>(smooth_index)},
                pointer<int8_t>(out), pointer<float>(scales));
}

void combine(int dtype, bool to_f32, uint64_t terms, int64_t num_rows, int64_t terms_per_row, int64_t hidden, uint64_t out,
             uint64_t out_stride) {
  not_negative(hidden, "hidden size");
  not_negative(terms_per_row, "terms");
  combine_rows(dtype_of(dtype), to_f32, pointer<const Term>(terms), num_rows, terms_per_row, hidden, pointer<uint8_t>(out),
               out_stride);
}

void pack(int dtype, uint64_t in, int64_t num_rows, int64_t hidden, uint64_t out, uint64_t scales) {
  not_negative(hidden, "hidden size");
  pack_rows(dtype_of(dtype), pointer<const uint8_t>(in), num_rows, hidden, pointer<int8_t>(out), pointer<uint8_t>(scales));
}

void unpack(int dtype, uint64_t in, uint64_t scales, int64_t num_rows, int64_t hidden, uint64_t out) {
  not_negative(hidden, "hidden size");
  unpack_rows(dtype_of(dtype), pointer<const int8_t>(in), pointer<const uint8_t>(scales), num_rows, hidden,
              pointer<uint8_t>(out));
}

int check_keys(KeyCheck& self, uint64_t raw, int64_t num_rows, int64_t active_rows, uint64_t mask, uint64_t out) {
  self.run(pointer<const int32_t>(raw), num_rows, active_rows, pointer<const uint8_t>(mask), pointer<int32_t>(out));
  return self.fault;
}

void write_running_counts(const KeySort& self, uint64_t out) {
  const std::vector<int32_t>& counts = self.running_counts();
  if (!counts.empty()) std::memcpy(pointer<int32_t>(out), counts.data(), counts.size() * sizeof(int32_t));
}

int run_terms(TermPlan& self, uint64_t keys, int64_t num_rows, uint64_t weights, const Sources& counts, const Sources* tags,
              const Sources& items, uint64_t item_bytes, uint64_t stride, uint64_t out, int64_t terms_per_row) {
  self.run({pointer<const int32_t>(keys), num_rows, pointer<const float>(weights), &counts, tags, &items, stride, item_bytes},
           pointer<Term>(out), terms_per_row);
  return self.fault;
}

void bind_keys(nb::module_& module) {
  nb::class_<KeyCheck>(module, "KeyCheck")
      .def(nb::init<int, int64_t, int64_t, int64_t, std::vector<int32_t>>(), "width"_a, "num_keys"_a, "first_special"_a,
           "end_special"_a, "extra_keys"_a = std::vector<int32_t>())
      .def("run", &check_keys, "raw"_a, "num_rows"_a, "active_rows"_a, "mask"_a, "out"_a)
      .def_ro("bad_pair", &KeyCheck::bad_pair)
      .def_ro("bad_key", &KeyCheck::bad_key)
      .def_prop_ro("out_width", &KeyCheck::out_width);

  nb::class_<KeySort>(module, "KeySort")
      .def(nb::init<int, int64_t, int64_t, int64_t>(), "width"_a, "num_keys"_a, "first"_a, "end"_a)
      .def("run", &KeySort::run, "keys"_a, NoGil())
      .def_prop_ro("num_rows", &KeySort::num_rows)
      .def_prop_ro("num_counts", [](const KeySort& self) { return self.running_counts().size(); })
      .def("write_running_counts", &write_running_counts, "out"_a)
      .def("write_key_counts", [](const KeySort& self, uint64_t out, bool cumulative) {
        self.write_key_counts(pointer<int64_t>(out), cumulative);
      }, "out"_a, "cumulative"_a)
      .def("write_tags", [](const KeySort& self, uint64_t out) { self.write_tags(pointer<int32_t>(out)); }, "out"_a, NoGil())
      .def("place", [](const KeySort& self, const Sources& items, uint64_t out, uint64_t out_bytes, uint64_t item_bytes,
                       uint64_t stride, bool per_pair, uint64_t nt_bytes) {
        self.place(items, pointer<uint8_t>(out), out_bytes, item_bytes, stride, per_pair, nt_bytes);
      }, "items"_a, "out"_a, "out_bytes"_a, "item_bytes"_a, "stride"_a, "per_pair"_a, "nt_bytes"_a = 0, NoGil());

  nb::class_<TermPlan>(module, "TermPlan")
      .def(nb::init<int, int, int, int, std::vector<int32_t>, std::vector<int32_t>>(), "width"_a, "num_weighted"_a, "num_sources"_a,
           "me"_a, "owners"_a, "slots"_a)
      .def("run", &run_terms, "keys"_a, "num_rows"_a, "weights"_a, "counts"_a, "tags"_a.none(), "items"_a, "item_bytes"_a,
           "stride"_a, "out"_a, "terms_per_row"_a, NoGil())
      .def_ro("bad_pair", &TermPlan::bad_pair)
      .def_ro("bad_owner", &TermPlan::bad_owner);
}

}  // namespace

void bind_rows(nb::module_& module) {
  bind_keys(module);
  module.def("last_sum", [](uint64_t sums, int64_t num_sums) { return last_sum(pointer<const int32_t>(sums), num_sums); }, "sums"_a,
             "num_sums"_a);
  module.def("copy", &copy, "out"_a, "source"_a, "num_bytes"_a, "nt_bytes"_a = 0, NoGil());
  module.def("gather_rows", &gather, "out"_a, "out_stride"_a, "source"_a, "source_bytes"_a, "stride"_a, "index"_a, "num_rows"_a,
             "row_bytes"_a, "nt_bytes"_a = 0, NoGil());
  module.def("quantise_rows", &quantise, "dtype"_a, "hidden"_a, "num_rows"_a, "source"_a, "stride"_a, "source_rows"_a, "out"_a,
             "scales"_a, "index"_a = 0, "smooth"_a = 0, "smooth_rows"_a = 0, "smooth_index"_a = 0, NoGil());
  module.def("combine_rows", &combine, "dtype"_a, "to_f32"_a, "terms"_a, "num_rows"_a, "terms_per_row"_a, "hidden"_a, "out"_a,
             "out_stride"_a, NoGil());
  module.def("pack_rows", &pack, "dtype"_a, "source"_a, "num_rows"_a, "hidden"_a, "out"_a, "scales"_a, NoGil());
  module.def("unpack_rows", &unpack, "dtype"_a, "source"_a, "scales"_a, "num_rows"_a, "hidden"_a, "out"_a, NoGil());
  module.def("kernels_name", [] { return kernels().name; });
  module.def("choose_kernels", &choose_kernels, "name"_a);
  module.def("has_kernels", [](const char* name) { return find_kernels(name) != nullptr; }, "name"_a);
  const std::pair<const char*, int> constants[] = {
      {"BF16", int(Dtype::bf16)}, {"FP16", int(Dtype::fp16)}, {"F32", int(Dtype::f32)},
      {"TERM_NOTHING", Term::nothing}, {"TERM_ROW", Term::row}, {"TERM_F32_ROW", Term::f32_row},
      {"KEY_OUT_OF_RANGE", KeyCheck::out_of_range}, {"KEY_DUPLICATE", KeyCheck::duplicate},
      {"FAULT_KEY", TermPlan::key}, {"FAULT_COUNT", TermPlan::count}, {"FAULT_TAG", TermPlan::tag},
      {"FAULT_BOUNDS", TermPlan::bounds}, {"FAULT_REST", TermPlan::rest}};
  for (const auto& [name, value] : constants) module.attr(name) = value;
}

}  // namespace commfuse
