#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "bind.h"
#include "channel.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace commfuse {
namespace {

nb::bytes to_bytes(const std::vector<uint8_t>& data) { return nb::bytes(data.data(), data.size()); }

LineIndex line_of(int line) {
  if (line < 0 || line >= kBell) fail("counter %d of %d", line, int(kBell));  // the bell is nobody's
  return static_cast<LineIndex>(line);
}

// status | member << 8. An interrupt is raised here: its exception is pending.
int report(const Outcome& outcome) {
  if (outcome.status == Status::interrupted) throw nb::python_error();
  return outcome.status == Status::ok ? 0 : static_cast<int>(outcome.status) | outcome.member << 8;
}

int64_t in_ns(double timeout_s) { return timeout_s < 0 ? -1 : static_cast<int64_t>(timeout_s * 1e9); }

int wait(Channel& self, int line, uint64_t target, double timeout_s, bool heed_poison) {
  self.check_process();
  if (self.all_reached(line_of(line), target)) return 0;
  Outcome outcome;
  {
    const nb::gil_scoped_release no_gil;
    outcome = self.wait(line_of(line), target, in_ns(timeout_s), heed_poison, python_interrupted);
  }
  return report(outcome);
}

bool reached_by_all(const Channel& self, int line, uint64_t target) {
  self.check_process();
  return self.all_reached(line_of(line), target);
}

int wait_member(Channel& self, int member, int line, uint64_t target, double timeout_s, bool heed_poison) {
  Outcome outcome;
  {
    const nb::gil_scoped_release no_gil;
    outcome = self.wait_member(member, line_of(line), target, in_ns(timeout_s), heed_poison, python_interrupted);
  }
  return report(outcome);
}

void set_segment(Offer& self, int index, uint64_t address, uint64_t num_bytes) {
  if (index < 0 || index >= kSegments) fail("segment %d of %d", index, kSegments);
  self.segments[index] = {address, num_bytes};
}

void set_body(Offer& self, nb::bytes body, uint32_t agreed_bytes) {
  const auto* data = reinterpret_cast<const uint8_t*>(body.c_str());
  if (agreed_bytes > body.size()) fail("%u agreed bytes of %zu", agreed_bytes, body.size());
  self.body.assign(data, data + body.size());
  self.agreed_bytes = agreed_bytes;
}

// The text was cut at a byte, by another process: it need not be whole UTF-8.
nb::object to_text(const std::string& bytes) {
  return nb::steal(PyUnicode_DecodeUTF8(bytes.data(), static_cast<Py_ssize_t>(bytes.size()), "replace"));
}

std::tuple<int, int, int, int, nb::object> cause(const Channel& self) {
  const Poison poison = self.cause();
  return {poison.epoch, poison.code, poison.subject, poison.finder, to_text(self.cause_text())};
}

}  // namespace

void bind_channel(nb::module_& module) {
  nb::class_<Sources>(module, "Sources")
      .def(nb::init<int>(), "num_sources"_a)
      .def("__len__", &Sources::size)
      .def("set", [](Sources& self, int source, uint64_t address, uint64_t num_bytes) {
        self.set(source, {pointer<const uint8_t>(address), num_bytes});
      }, "source"_a, "address"_a, "num_bytes"_a)
      .def("address", [](const Sources& self, int source) { return reinterpret_cast<uint64_t>(self.at(source).data); }, "source"_a)
      .def("num_bytes", [](const Sources& self, int source) { return self.at(source).num_bytes; }, "source"_a);

  nb::class_<Offer>(module, "Offer")
      .def(nb::init<>())
      .def("set_body", &set_body, "body"_a, "agreed_bytes"_a)
      .def("set_segment", &set_segment, "index"_a, "address"_a, "num_bytes"_a);

  nb::class_<Channel>(module, "Channel")
      .def(nb::init<std::shared_ptr<Arena>, const std::vector<std::shared_ptr<Mapping>>&, const std::vector<uint64_t>&, int,
                    uint64_t>(), "arena"_a, "peers"_a, "offsets"_a, "index"_a, "group_id"_a)
      .def_prop_ro("num_members", &Channel::num_members)
      .def_prop_ro("index", &Channel::index)
      .def_prop_rw("active", &Channel::active, &Channel::set_active)
      .def_rw("spin_ns", &Channel::spin_ns)
      .def_rw("slice_ns", &Channel::slice_ns)
      .def_prop_rw("waited_ns", &Channel::waited_ns, &Channel::set_waited_ns)
      .def_ro("moved_ns", &Channel::moved_ns)
      .def("publish", &Channel::publish, "sequence"_a, "offer"_a)
      .def("advance", [](Channel& self, int line, uint64_t value) { self.advance(line_of(line), value); }, "line"_a, "value"_a)
      .def("wait", &wait, "line"_a, "target"_a, "timeout_s"_a = -1.0, "heed_poison"_a = true)
      .def("wait_member", &wait_member, "member"_a, "line"_a, "target"_a, "timeout_s"_a = -1.0, "heed_poison"_a = true)
      .def("reached", &reached_by_all, "line"_a, "target"_a)
      .def("resolve", &Channel::resolve, "sequence"_a, "offer"_a)
      .def("sources", &Channel::sources, "segment"_a)
      .def("body", [](const Channel& self, int member, uint64_t sequence) { return to_bytes(self.body(member, sequence)); },
           "member"_a, "sequence"_a)
      .def("sequence_in_slot", &Channel::sequence_in_slot, "member"_a, "sequence"_a)
      .def("post", [](Channel& self, uint64_t number, nb::bytes message) {
        self.post(number, reinterpret_cast<const uint8_t*>(message.c_str()), message.size());
      }, "number"_a, "message"_a)
      .def("posted", [](const Channel& self, int member, uint64_t number) { return to_bytes(self.posted(member, number)); },
           "member"_a, "number"_a)
      .def("counter", [](const Channel& self, int member, int line) { return self.counter(member, line_of(line)); },
           "member"_a, "line"_a)
      .def("alive", &Channel::alive, "member"_a)
      .def("poison", &Channel::poison, "code"_a, "subject"_a, "text"_a)
      .def_prop_ro("poisoned", &Channel::poisoned)
      .def("cause", &cause)
      .def_prop_rw("epoch", &Channel::epoch, &Channel::set_epoch);

  const std::pair<const char*, int> constants[] = {
      {"PUBLISHED", kPublished}, {"CONSUMED", kConsumed}, {"POSTED", kPosted}, {"PROGRESS", kProgress},
      {"OK", int(Status::ok)}, {"DEAD", int(Status::dead)}, {"DEADLINE", int(Status::deadline)},
      {"POISONED", int(Status::poisoned)},
      {"NUM_SEGMENTS", kSegments}, {"POST_BYTES", int(kPostBytes)}, {"RECORD_BYTES", int(sizeof(Record))}};
  for (const auto& [name, value] : constants) module.attr(name) = value;
}

}  // namespace commfuse
