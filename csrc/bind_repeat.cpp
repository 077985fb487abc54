#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "arguments.h"
#include "bind.h"
#include "call_line.h"
#include "repeat.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace commfuse {
namespace {

using Blanks = std::vector<std::pair<std::vector<int64_t>, nb::object>>;  // shape, and a tensor of the dtype

// Three int64 of the caller's, in an object with a buffer: calls, of them errors, nanoseconds in all.
class Tally {
 public:
  explicit Tally(nb::handle numbers) {
    if (PyObject_GetBuffer(numbers.ptr(), &buffer_, PyBUF_WRITABLE) != 0) throw nb::python_error();
    if (buffer_.len == 3 * sizeof(int64_t)) return;
    PyBuffer_Release(&buffer_);
    fail("a tally of %zd bytes", buffer_.len);
  }
  ~Tally() { PyBuffer_Release(&buffer_); }
  Tally(const Tally&) = delete;
  Tally& operator=(const Tally&) = delete;
  void count(int64_t nanoseconds, bool failed) {
    auto* const numbers = static_cast<int64_t*>(buffer_.buf);
    numbers[0]++;
    numbers[1] += failed;
    numbers[2] += nanoseconds;
  }

 private:
  Py_buffer buffer_{};
};

// What came of `run` or `finish` where it is not the end of the call: the caller, in Python, sees to it. Above 0: the wait until
// all have published has ended with Channel.wait's status.
enum Stop : int {
  kDiffers = -1,  // a header differs from this rank's
  kFault = -2,    // the rows that the others hold do not fit this rank's keys
  kUnheard = -3,  // a rank has found a fault, or has not said yet that it has found none
};

constexpr int64_t kSlice = 50'000'000;  // nanoseconds until the caller looks at what the others do instead of coming

// What both repeated calls are made of, and their course up to the wait for the others.
//
// `run` begins a call at the turnstile and ends it there. Where it stops or throws the call is still under way: the caller goes on
// with `finish`, or gives the group up, and then leaves.
class Repeated {
 public:
  Repeated(const nb::dict& sample, nb::handle line, std::initializer_list<nb::handle> parts, nb::bytes body, uint32_t number_begin,
           const Blanks& outputs, nb::handle tally)
      : kept_{nb::borrow(line)}, calls(nb::cast<CallLine&>(line)), type(calls.slabs().type()), args(type, sample), tally_(tally),
        seating_(calls.turns().seating), number_at_(number_begin) {
    for (const nb::handle part : parts) kept_.push_back(nb::borrow(part));
    const auto* data = reinterpret_cast<const uint8_t*>(body.c_str());
    offer.body.assign(data, data + body.size());
    offer.agreed_bytes = number_begin + 8;
    for (const auto& [shape, tensor] : outputs) blanks.push_back(form_of(type, shape, tensor));
  }
  virtual ~Repeated() = default;
  Repeated(const Repeated&) = delete;
  Repeated& operator=(const Repeated&) = delete;

  // The outputs; None, and nothing is published, when this is another call or not an ordinary one; or a Stop.
  nb::object run(const nb::dict& given) {
    if (!calls.turns().enter()) return nb::none();
    is_under_way = true;
    begin_ = now_ns();
    if (!args.match(given) || !calls.is_clear(seating_) || !is_ready()) return leave(nb::none());
    step("publish");
    sequence = calls.begin();
    set_number(offer, number_at_, calls.turns().calls);
    int status = -1;
    {
      const nb::gil_scoped_release no_gil;
      if (publish()) status = wait();
    }
    if (status < 0) {  // a key is not valid: the other way says which
      calls.forget();
      return leave(nb::none());
    }
    if ((status & 0xff) == static_cast<int>(Status::interrupted)) throw nb::python_error();
    has_published(given);
    return status ? nb::int_(status) : finish();
  }

  // As `run`, once all have published.
  virtual nb::object finish() = 0;

  // Ends a call that has stopped or thrown.
  virtual void give_up(bool has_failed) {
    if (has_failed) tally_.count(now_ns() - begin_, true);
    leave(nb::none());
  }

  bool is_current() const { return calls.turns().seating == seating_; }

  Offer offer;
  uint64_t sequence = 0;
  bool is_under_way = false;
  nb::object at_step;  // called with the name of each step that begins; for tests

 private:
  std::vector<nb::object> kept_;  // alive: what the steps refer to

 protected:
  // Lays out what is to be published; false when that cannot be this call's. May throw OutOfMemory.
  virtual bool prepare() = 0;
  // False when a key is not valid; nothing is published.
  virtual bool publish() = 0;
  virtual void has_published(const nb::dict&) {}

  void step(const char* name) const {
    if (at_step.is_valid() && !at_step.is_none()) at_step(name);
  }
  nb::object leave(nb::object result) {
    is_under_way = false;
    calls.turns().leave();
    return result;
  }
  // The end of a call that gives a result.
  nb::object succeed(nb::object outputs) {
    tally_.count(now_ns() - begin_, false);
    return leave(std::move(outputs));
  }

  CallLine& calls;
  const TensorType& type;
  Arguments args;
  std::vector<TensorForm> blanks;

 private:
  bool is_ready() {
    try {
      return prepare();
    } catch (const OutOfMemory&) {
      return false;  // the other way tells the peers
    }
  }
  int wait() {
    Channel& channel = calls.channel();
    if (channel.all_reached(kPublished, sequence)) return 0;
    const Outcome outcome = channel.wait(kPublished, sequence, kSlice, true, python_interrupted);
    return outcome.status == Status::ok ? 0 : static_cast<int>(outcome.status) | outcome.member << 8;
  }

  Tally tally_;
  const uint64_t seating_;
  const uint32_t number_at_;
  int64_t begin_ = 0;
};

// expert_ids and the mask of a call.
struct Keys {
  const void *const *ids, *const *mask;
  bool by_row;
  explicit Keys(const Arguments& args)
      : ids(args.data("expert_ids")), mask(args.data_or_none("x_active_mask")), by_row(args.ndim("x_active_mask") == 1) {}
  RawKeys raw() const { return {static_cast<const int32_t*>(*ids), static_cast<const uint8_t*>(*mask), by_row}; }
};

class Dispatch : public Repeated {
 public:
  Dispatch(const nb::dict& sample, nb::handle line, nb::handle check, nb::handle sort, nb::bytes body, uint32_t number_begin,
           const Blanks& outputs, nb::handle tally, int dtype, bool quantised, bool cumulative, uint64_t nt_bytes, nb::object inference_mode,
           nb::object lend_normal)
      : Repeated(sample, line, {check, sort}, body, number_begin, outputs, tally),
        steps(calls.channel(), nb::cast<KeyCheck&>(check), nb::cast<KeySort&>(sort),
              form(type, sample["x"], dtype, quantised, *args.data_or_none("expert_scales") != nullptr, cumulative, nt_bytes)),
        keys(args), x(args.data("x")), weights(args.data_or_none("expert_scales")), inference_mode_(std::move(inference_mode)),
        lend_normal_(std::move(lend_normal)) {
    if (blanks.size() != 7 || blanks[0].shape.size() != 2 || blanks[0].num_bytes() == 0) fail("%zu outputs", blanks.size());
  }

  nb::object finish() override {
    int64_t num_rows = 0;
    {
      const nb::gil_scoped_release no_gil;
      num_rows = steps.count(sequence, offer);
    }
    if (num_rows < 0) return nb::int_(int(kDiffers));
    calls.take_back();  // who is here has read what earlier calls lent: its memory may serve this one
    step("pull");
    void* data[7];
    nb::object made[7];
    made[0] = rows(num_rows, &data[0]);
    for (size_t i = 1; i < 7; i++) made[i] = type.make(blanks[i], &data[i]);
    if (blanks[5].num_bytes()) *static_cast<int32_t*>(data[5]) = static_cast<int32_t>(num_rows);  // no partner: the own rows
    {
      const nb::gil_scoped_release no_gil;
      steps.place({static_cast<uint8_t*>(data[0]), blanks[0].num_bytes(), static_cast<float*>(data[1]), blanks[1].num_bytes(),
                   static_cast<float*>(data[6]), blanks[6].num_bytes(), static_cast<int32_t*>(data[2]),
                   static_cast<int64_t*>(data[3]), static_cast<int32_t*>(data[4])});
    }
    step("end");
    calls.end(sequence);
    return succeed(nb::make_tuple(made[0], made[1], made[2], made[3], made[4], made[5], made[6]));
  }

 protected:
  bool prepare() override {
    staging = calls.stage(steps.staged_bytes());
    return true;
  }
  bool publish() override {
    const RepeatedDispatch::Given given{keys.raw(), static_cast<const uint8_t*>(*x), static_cast<const float*>(*weights)};
    return steps.publish(sequence, offer, given, pointer<uint8_t>(staging));
  }

 private:
  static RepeatedDispatch::Form form(const TensorType& type, nb::handle rows, int dtype, bool quantised, bool weighted,
                                     bool cumulative, uint64_t nt_bytes) {
    nb::dlpack::dltensor seen;
    if (!type.look(rows, &seen) || seen.ndim != 2) fail("rows that cannot be looked at");
    return {static_cast<Dtype>(dtype), seen.shape[0], seen.shape[1], quantised, weighted, cumulative, nt_bytes};
  }

  // Room for all rows that may come, of which num_rows can be written.
  nb::object rows(int64_t num_rows, void** data) {
    const TensorForm& all = blanks[0];
    const uint64_t row_bytes = all.num_bytes() / static_cast<uint64_t>(all.shape[0]);
    Slab& slab = calls.slabs().take_ready(all.num_bytes(), std::min(static_cast<uint64_t>(num_rows) * row_bytes, all.num_bytes()));
    *data = pointer<void>(slab.address);
    try {
      if (nb::cast<bool>(inference_mode_())) return lend_normal_(nb::cast(&slab, nb::rv_policy::reference));
      return calls.slabs().lend(slab, all);
    } catch (...) {
      if (!calls.slabs().at(slab.address)) calls.slabs().give(slab);  // otherwise it comes back with its tensor
      throw;
    }
  }

  RepeatedDispatch steps;
  Keys keys;
  const void *const *x, *const *weights;
  nb::object inference_mode_;  // tells whether it is on: a tensor made then has no count of its changes
  nb::object lend_normal_;     // makes one that has, of the slab
  uint64_t staging = 0;
};

class Combine : public Repeated {
 public:
  Combine(const nb::dict& sample, nb::handle line, nb::handle check, nb::handle terms, nb::handle sort, nb::bytes body,
          uint32_t number_begin, const Blanks& outputs, nb::handle tally, int dtype, int64_t num_counts, int64_t room, uint64_t nt_bytes)
      : Repeated(sample, line, {check, terms, sort}, body, number_begin, outputs, tally),
        steps(calls.channel(), nb::cast<KeyCheck&>(check), nb::cast<TermPlan&>(terms), nb::cast<KeySort&>(sort),
              form(blanks, dtype, num_counts, room, nt_bytes)),
        keys(args), rows(args.data("expand_x")), tags(args.data("assist_info_for_combine")),
        counts(args.data("ep_send_counts")), weights(args.data("expert_scales")) {}

  nb::object finish() override {
    {
      const nb::gil_scoped_release no_gil;
      fault = steps.find(sequence, offer, static_cast<const float*>(*weights));
    }
    if (fault) return nb::int_(fault < 0 ? int(kDiffers) : int(kFault));
    step("sum");
    void* data = nullptr;
    sums = type.make(blanks[0], &data);
    {
      const nb::gil_scoped_release no_gil;
      steps.sum(static_cast<uint8_t*>(data));
    }
    step("end");
    calls.end(sequence);
    bool differs = false;
    Outcome outcome;
    {
      const nb::gil_scoped_release no_gil;
      outcome = steps.hear(sequence, kSlice, python_interrupted, &differs);
    }
    if (outcome.status == Status::interrupted) throw nb::python_error();
    return differs || outcome.status != Status::ok ? nb::int_(int(kUnheard)) : close();
  }

  void give_up(bool has_failed) override {
    sums.reset();
    Repeated::give_up(has_failed);
  }

  // The end, once all are known to be content.
  nb::object close() {
    step("take back");
    calls.take_back();
    return succeed(nb::make_tuple(std::move(sums)));
  }

  uint64_t published_keys() const { return reinterpret_cast<uint64_t>(steps.keys()); }
  int fault = 0;  // one of TermPlan

 protected:
  bool prepare() override {
    num_rows = steps.num_held(static_cast<const int32_t*>(*counts));
    if (num_rows < 0) return false;
    slab = calls.slabs().at(reinterpret_cast<uint64_t>(*rows));
    staging = calls.stage(steps.staged_bytes(num_rows, slab != nullptr));
    if (slab) slab->add_reader(calls.reading(calls.newest() + 1));  // now: an interrupt may end the wait once peers can read it
    return true;
  }
  bool publish() override {
    const RepeatedCombine::Held held{static_cast<const int32_t*>(*counts), static_cast<const int32_t*>(*tags),
                                     static_cast<const uint8_t*>(*rows), slab != nullptr};
    return steps.publish(sequence, offer, num_rows, held, keys.raw(), pointer<uint8_t>(staging));
  }
  void has_published(const nb::dict& given) override {
    if (slab) calls.loans.add(nb::borrow(given["expand_x"]), sequence);
  }

 private:
  static RepeatedCombine::Form form(const std::vector<TensorForm>& blanks, int dtype, int64_t num_counts, int64_t room,
                                    uint64_t nt_bytes) {
    if (blanks.size() != 1 || blanks[0].shape.size() != 2) fail("%zu outputs", blanks.size());
    return {static_cast<Dtype>(dtype), blanks[0].shape[0], blanks[0].shape[1], num_counts, room, nt_bytes};
  }

  RepeatedCombine steps;
  Keys keys;
  const void *const *rows, *const *tags, *const *counts, *const *weights;
  int64_t num_rows = 0;
  Slab* slab = nullptr;  // that holds the rows; null: they are copied
  uint64_t staging = 0;
  nb::object sums;
};

}  // namespace

void bind_repeat(nb::module_& module) {
  nb::class_<Repeated>(module, "Repeated")
      .def("run", &Repeated::run, "args"_a)
      .def("finish", &Repeated::finish)
      .def_ro("offer", &Repeated::offer)
      .def_ro("sequence", &Repeated::sequence)
      .def_ro("is_under_way", &Repeated::is_under_way)
      .def_prop_ro("is_current", &Repeated::is_current)
      .def("give_up", &Repeated::give_up, "has_failed"_a)
      .def_rw("at_step", &Repeated::at_step, nb::arg().none());

  nb::class_<Dispatch, Repeated>(module, "RepeatedDispatch")
      .def(nb::init<const nb::dict&, nb::handle, nb::handle, nb::handle, nb::bytes, uint32_t, const Blanks&, nb::handle, int, bool,
                    bool, uint64_t, nb::object, nb::object>(), "args"_a, "calls"_a, "check"_a, "sort"_a, "body"_a, "number_at"_a,
           "outputs"_a, "tally"_a, "dtype"_a, "quantised"_a, "cumulative"_a, "nt_bytes"_a,
           "inference_mode"_a, "lend_normal"_a);

  nb::class_<Combine, Repeated>(module, "RepeatedCombine")
      .def(nb::init<const nb::dict&, nb::handle, nb::handle, nb::handle, nb::handle, nb::bytes, uint32_t, const Blanks&, nb::handle,
                    int, int64_t, int64_t, uint64_t>(), "args"_a, "calls"_a, "check"_a, "terms"_a, "sort"_a, "body"_a, "number_at"_a,
           "outputs"_a, "tally"_a, "dtype"_a, "num_counts"_a, "room"_a, "nt_bytes"_a)
      .def_prop_ro("keys", &Combine::published_keys)
      .def_ro("fault", &Combine::fault)
      .def("close", &Combine::close);

  for (const auto& [name, value] : {std::pair{"DIFFERS", kDiffers}, {"FAULT", kFault}, {"UNHEARD", kUnheard}}) module.attr(name) = int(value);
}

}  // namespace commfuse
