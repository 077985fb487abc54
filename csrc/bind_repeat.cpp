#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/vector.h>

#include "bind.h"
#include "repeat.h"
#include "tensors.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace commfuse {
namespace {

using Blanks = std::vector<std::pair<std::vector<int64_t>, nb::object>>;  // shape, and a tensor of the dtype

// The arguments of one call, and whether another call has the same: tensors by form, everything else by value.
class Arguments {
 public:
  Arguments(const TensorType& type, const nb::dict& sample) : type_(type) {
    for (const auto& [name, value] : sample) slots_.push_back(slot(name, value));
  }

  bool match(const nb::dict& args) {
    PyObject *name = nullptr, *value = nullptr;
    Py_ssize_t at = 0;
    size_t i = 0;
    for (; PyDict_Next(args.ptr(), &at, &name, &value); i++)
      if (i >= slots_.size() || slots_[i].name.ptr() != name || !same(slots_[i], value)) return false;
    return i == slots_.size();
  }

  // Where the tensor `name` of the call that was matched last begins.
  const void* const* data(const char* name) const {
    const Slot* found = find(name);
    if (!found) fail("no tensor %s", name);
    return &found->data;
  }
  // The same for a tensor that need not be given: null then.
  const void* const* data_or_none(const char* name) const {
    static const void* const none = nullptr;
    const Slot* found = find(name);
    return found ? &found->data : &none;
  }
  size_t ndim(const char* name) const {
    const Slot* found = find(name);
    return found ? found->form.shape.size() : 0;
  }

 private:
  struct Slot {
    nb::object name, value;
    bool is_tensor = false;
    TensorForm form;
    const void* data = nullptr;
  };

  const Slot* find(const char* name) const {
    for (const Slot& one : slots_)
      if (one.is_tensor && PyUnicode_CompareWithASCIIString(one.name.ptr(), name) == 0) return &one;
    return nullptr;
  }

  Slot slot(nb::handle name, nb::handle value) const {
    Slot result{nb::borrow(name), nb::borrow(value)};
    nb::dlpack::dltensor seen;
    if (type_.is(value)) {
      if (!type_.look(value, &seen) || !is_dense(seen)) fail("a tensor that is not dense");
      result.is_tensor = true;
      result.form = {seen.dtype, {seen.shape, seen.shape + seen.ndim}};
      result.data = static_cast<const uint8_t*>(seen.data) + seen.byte_offset;
      result.value.reset();
    } else if (!value.is_none() && !nb::isinstance<nb::str>(value) && !nb::isinstance<nb::int_>(value)) {
      fail("an argument that could change");
    }
    return result;
  }

  bool same(Slot& slot, PyObject* value) const {
    if (slot.is_tensor) {
      nb::dlpack::dltensor seen;
      if (!type_.is(value) || !type_.look(value, &seen) || !has_form(seen, slot.form) || !is_dense(seen)) return false;
      slot.data = static_cast<const uint8_t*>(seen.data) + seen.byte_offset;
      return true;
    }
    PyObject* const mine = slot.value.ptr();
    if (mine == value) return true;
    if (Py_TYPE(mine) != Py_TYPE(value)) return false;
    const int equal = PyObject_RichCompareBool(mine, value, Py_EQ);
    if (equal < 0) PyErr_Clear();
    return equal == 1;
  }

  const TensorType& type_;
  std::vector<Slot> slots_;
};

// Memory of an arena as tensors.
struct Lender {
  TensorType type;
  std::shared_ptr<Arena> arena;
  std::shared_ptr<Returned> returned = std::make_shared<Returned>();

  Lender(nb::handle tensor_type, std::shared_ptr<Arena> of_arena) : type(tensor_type), arena(std::move(of_arena)) {}
  nb::object lend(uint64_t address, std::vector<int64_t> shape, nb::handle sample) const {
    return type.lend(form_of(type, std::move(shape), sample), address, arena, returned);
  }
};

// What both repeated calls are made of.
struct Repeated {
  TensorType type;
  Arguments args;
  std::vector<nb::object> kept;  // alive: what the steps refer to
  Channel& channel;
  Offer offer;
  uint32_t number_at;
  std::vector<TensorForm> blanks;

  Repeated(const nb::dict& sample, nb::handle tensor_type, nb::handle of_channel, std::initializer_list<nb::handle> parts,
           nb::bytes body, uint32_t number_begin, const Blanks& outputs)
      : type(tensor_type), args(type, sample), kept{nb::borrow(of_channel)}, channel(nb::cast<Channel&>(of_channel)),
        number_at(number_begin) {
    for (const nb::handle part : parts) kept.push_back(nb::borrow(part));
    const auto* data = reinterpret_cast<const uint8_t*>(body.c_str());
    offer.body.assign(data, data + body.size());
    offer.agreed_bytes = number_begin + 8;
    for (const auto& [shape, tensor] : outputs) blanks.push_back(form_of(type, shape, tensor));
  }
  Repeated(const Repeated&) = delete;

  // 0, or status | member << 8, as Channel.wait.
  int wait(uint64_t sequence, double timeout_s) {
    Outcome outcome;
    if (!channel.all_reached(kPublished, sequence))
      outcome = channel.wait(kPublished, sequence, static_cast<int64_t>(timeout_s * 1e9), true, python_interrupted);
    return report(outcome);
  }

  static int report(const Outcome& outcome) {
    return outcome.status == Status::ok ? 0 : static_cast<int>(outcome.status) | outcome.member << 8;
  }
};

// expert_ids and the mask of a call.
struct Keys {
  const void *const *ids, *const *mask;
  bool by_row;
  explicit Keys(const Arguments& args)
      : ids(args.data("expert_ids")), mask(args.data_or_none("x_active_mask")), by_row(args.ndim("x_active_mask") == 1) {}
  RawKeys raw() const { return {static_cast<const int32_t*>(*ids), static_cast<const uint8_t*>(*mask), by_row}; }
};

int checked(int status) {
  if ((status & 0xff) == static_cast<int>(Status::interrupted)) throw nb::python_error();
  return status;
}

struct Dispatch : Repeated {
  RepeatedDispatch steps;
  Keys keys;
  const void *const *x, *const *weights;

  Dispatch(const nb::dict& sample, nb::handle tensor_type, nb::handle of_channel, nb::handle check, nb::handle sort, nb::bytes body,
           uint32_t number_begin, const Blanks& outputs, int dtype, bool quantised, bool cumulative, uint64_t nt_bytes)
      : Repeated(sample, tensor_type, of_channel, {check, sort}, body, number_begin, outputs),
        steps(channel, nb::cast<KeyCheck&>(check), nb::cast<KeySort&>(sort),
              form(type, sample["x"], dtype, quantised, *args.data_or_none("expert_scales") != nullptr, cumulative, nt_bytes)),
        keys(args), x(args.data("x")), weights(args.data_or_none("expert_scales")) {
    if (blanks.size() != 6) fail("%zu outputs beside the rows", blanks.size());
  }

  static RepeatedDispatch::Form form(const TensorType& type, nb::handle rows, int dtype, bool quantised, bool weighted,
                                     bool cumulative, uint64_t nt_bytes) {
    nb::dlpack::dltensor seen;
    if (!type.look(rows, &seen) || seen.ndim != 2) fail("rows that cannot be looked at");
    return {static_cast<Dtype>(dtype), seen.shape[0], seen.shape[1], quantised, weighted, cumulative, nt_bytes};
  }

  int start(uint64_t sequence, uint64_t number, uint64_t staging, double timeout_s) {
    int status = -1;
    {
      const nb::gil_scoped_release no_gil;
      set_number(offer, number_at, number);
      const RepeatedDispatch::Given given{keys.raw(), static_cast<const uint8_t*>(*x), static_cast<const float*>(*weights)};
      if (steps.publish(sequence, offer, given, pointer<uint8_t>(staging)))
        status = wait(sequence, timeout_s);
    }
    return status < 0 ? status : checked(status);
  }

  nb::tuple place(uint64_t rows, uint64_t rows_bytes, int64_t num_rows) {
    void* data[6];
    nb::object made[6];
    for (size_t i = 0; i < 6; i++) made[i] = type.make(blanks[i], &data[i]);
    if (blanks[4].num_bytes()) *static_cast<int32_t*>(data[4]) = static_cast<int32_t>(num_rows);  // no partner: the own rows
    {
      const nb::gil_scoped_release no_gil;
      steps.place({pointer<uint8_t>(rows), rows_bytes, static_cast<float*>(data[0]), blanks[0].num_bytes(),
                   static_cast<float*>(data[5]), blanks[5].num_bytes(), static_cast<int32_t*>(data[1]),
                   static_cast<int64_t*>(data[2]), static_cast<int32_t*>(data[3])});
    }
    return nb::make_tuple(made[0], made[1], made[2], made[3], made[4], made[5]);
  }
};

struct Combine : Repeated {
  RepeatedCombine steps;
  Keys keys;
  const void *const *rows, *const *tags, *const *counts, *const *weights;
  int64_t num_rows = 0;

  Combine(const nb::dict& sample, nb::handle tensor_type, nb::handle of_channel, nb::handle check, nb::handle terms, nb::handle sort,
          nb::bytes body, uint32_t number_begin, const Blanks& outputs, int dtype, int64_t num_counts, int64_t room, uint64_t nt_bytes)
      : Repeated(sample, tensor_type, of_channel, {check, terms, sort}, body, number_begin, outputs),
        steps(channel, nb::cast<KeyCheck&>(check), nb::cast<TermPlan&>(terms), nb::cast<KeySort&>(sort),
              form(blanks, dtype, num_counts, room, nt_bytes)),
        keys(args), rows(args.data("expand_x")), tags(args.data("assist_info_for_combine")),
        counts(args.data("ep_send_counts")), weights(args.data("expert_scales")) {}

  static RepeatedCombine::Form form(const std::vector<TensorForm>& blanks, int dtype, int64_t num_counts, int64_t room,
                                    uint64_t nt_bytes) {
    if (blanks.size() != 1 || blanks[0].shape.size() != 2) fail("%zu outputs", blanks.size());
    return {static_cast<Dtype>(dtype), blanks[0].shape[0], blanks[0].shape[1], num_counts, room, nt_bytes};
  }

  // Bytes to stage; -1 when the counts cannot be true.
  int64_t prepare(bool in_place) {
    num_rows = steps.num_held(static_cast<const int32_t*>(*counts));
    return num_rows < 0 ? -1 : static_cast<int64_t>(steps.staged_bytes(num_rows, in_place));
  }

  int start(uint64_t sequence, uint64_t number, uint64_t staging, bool in_place, double timeout_s) {
    int status = -1;
    {
      const nb::gil_scoped_release no_gil;
      set_number(offer, number_at, number);
      const RepeatedCombine::Held held{static_cast<const int32_t*>(*counts), static_cast<const int32_t*>(*tags),
                                       static_cast<const uint8_t*>(*rows), in_place};
      if (steps.publish(sequence, offer, num_rows, held, keys.raw(), pointer<uint8_t>(staging)))
        status = wait(sequence, timeout_s);
    }
    return status < 0 ? status : checked(status);
  }

  int find(uint64_t sequence) {
    const nb::gil_scoped_release no_gil;
    return steps.find(sequence, offer, static_cast<const float*>(*weights));
  }

  nb::object sum() {
    void* data = nullptr;
    nb::object made = type.make(blanks[0], &data);
    const nb::gil_scoped_release no_gil;
    steps.sum(static_cast<uint8_t*>(data));
    return made;
  }

  int hear(uint64_t sequence, double timeout_s) {
    bool differs = false;
    Outcome outcome;
    {
      const nb::gil_scoped_release no_gil;
      outcome = steps.hear(sequence, static_cast<int64_t>(timeout_s * 1e9), python_interrupted, &differs);
    }
    return differs ? -1 : checked(report(outcome));
  }
};

}  // namespace

void bind_repeat(nb::module_& module) {
  nb::class_<Lender>(module, "Lender")
      .def(nb::init<nb::handle, std::shared_ptr<Arena>>(), "tensor_type"_a, "arena"_a)
      .def("lend", &Lender::lend, "address"_a, "shape"_a, "sample"_a)
      .def_prop_ro("has_returned", [](const Lender& self) { return !self.returned->empty(); })
      .def("returned", [](const Lender& self) { return self.returned->take(); });

  nb::class_<Repeated>(module, "Repeated")
      .def("match", [](Repeated& self, const nb::dict& args) { return self.args.match(args); }, "args"_a)
      .def_ro("offer", &Repeated::offer);

  nb::class_<Dispatch, Repeated>(module, "RepeatedDispatch")
      .def(nb::init<const nb::dict&, nb::handle, nb::handle, nb::handle, nb::handle, nb::bytes, uint32_t, const Blanks&, int, bool,
                    bool, uint64_t>(), "args"_a, "tensor_type"_a, "channel"_a, "check"_a, "sort"_a, "body"_a, "number_at"_a,
           "outputs"_a, "dtype"_a, "quantised"_a, "cumulative"_a, "nt_bytes"_a)
      .def_prop_ro("staged_bytes", [](const Dispatch& self) { return self.steps.staged_bytes(); })
      .def("start", &Dispatch::start, "sequence"_a, "number"_a, "staging"_a, "timeout_s"_a)
      .def("count", [](Dispatch& self, uint64_t sequence) { return self.steps.count(sequence, self.offer); }, "sequence"_a,
           nb::call_guard<nb::gil_scoped_release>())
      .def("place", &Dispatch::place, "rows"_a, "rows_bytes"_a, "num_rows"_a);

  nb::class_<Combine, Repeated>(module, "RepeatedCombine")
      .def(nb::init<const nb::dict&, nb::handle, nb::handle, nb::handle, nb::handle, nb::handle, nb::bytes, uint32_t, const Blanks&,
                    int, int64_t, int64_t, uint64_t>(), "args"_a, "tensor_type"_a, "channel"_a, "check"_a, "terms"_a, "sort"_a,
           "body"_a, "number_at"_a, "outputs"_a, "dtype"_a, "num_counts"_a, "room"_a, "nt_bytes"_a)
      .def_prop_ro("rows", [](const Combine& self) { return reinterpret_cast<uint64_t>(*self.rows); })
      .def_prop_ro("keys", [](const Combine& self) { return reinterpret_cast<uint64_t>(self.steps.keys()); })
      .def("prepare", &Combine::prepare, "in_place"_a)
      .def("start", &Combine::start, "sequence"_a, "number"_a, "staging"_a, "in_place"_a, "timeout_s"_a)
      .def("find", &Combine::find, "sequence"_a)
      .def("sum", &Combine::sum)
      .def("hear", &Combine::hear, "sequence"_a, "timeout_s"_a);
}

}  // namespace commfuse
