#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/vector.h>

#include "bind.h"
#include "call_line.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace commfuse {
namespace {

std::shared_ptr<WindowSlabs> make_slabs(std::shared_ptr<Arena> arena, nb::handle tensor_type, nb::callable on_large_tail) {
  return std::make_shared<WindowSlabs>(tensor_type, std::move(arena), [tell = std::move(on_large_tail)](uint64_t filled, uint64_t used) {
    tell(filled, used);
  });
}

}  // namespace

void bind_calls(nb::module_& module) {
  nb::class_<Reading>(module, "Reading");

  nb::class_<Slab>(module, "Slab")
      .def_ro("offset", &Slab::offset)
      .def_ro("num_bytes", &Slab::num_bytes)
      .def_ro("address", &Slab::address)
      .def_ro("used", &Slab::used)
      .def("add_reader", &Slab::add_reader, "reading"_a)
      .def("in_use", &Slab::in_use);

  nb::class_<WindowSlabs>(module, "Slabs")
      .def(nb::new_(&make_slabs), "arena"_a, "tensor_type"_a, "on_large_tail"_a)
      .def("take", &WindowSlabs::take, "num_bytes"_a, nb::rv_policy::reference_internal)
      .def("take_ready", &WindowSlabs::take_ready, "num_bytes"_a, "used"_a, nb::rv_policy::reference_internal)
      .def("populate", &WindowSlabs::populate, "slab"_a, "num_bytes"_a)
      .def("give", &WindowSlabs::give, "slab"_a)
      .def("empty_free", &WindowSlabs::empty_free)
      .def("at", &WindowSlabs::at, "address"_a, nb::rv_policy::reference_internal)
      .def("lend", [](WindowSlabs& self, Slab& slab, std::vector<int64_t> shape, nb::handle sample) {
        return self.lend(slab, form_of(self.type(), std::move(shape), sample));
      }, "slab"_a, "shape"_a, "sample"_a)
      .def("view", [](const WindowSlabs& self, const Slab& slab, uint64_t begin, std::vector<int64_t> shape, nb::handle sample) {
        return self.view(slab, begin, form_of(self.type(), std::move(shape), sample));
      }, "slab"_a, "begin"_a, "shape"_a, "sample"_a);

  nb::class_<Turnstile>(module, "Turnstile")
      .def(nb::init<>())
      .def("enter", &Turnstile::enter)
      .def("leave", &Turnstile::leave)
      .def_prop_ro("here", &Turnstile::here)
      .def_prop_ro("is_shut", &Turnstile::is_shut)
      .def_rw("calls", &Turnstile::calls)
      .def_rw("seating", &Turnstile::seating)
      .def_rw("has_told_others", &Turnstile::has_told_others)
      .def_rw("unheard", &Turnstile::unheard);

  nb::class_<CallLine>(module, "Calls")
      .def(nb::init<std::shared_ptr<Channel>, std::shared_ptr<Turnstile>, std::shared_ptr<WindowSlabs>, uint64_t>(), "channel"_a,
           "turns"_a, "slabs"_a, "depth"_a)
      .def_prop_ro("newest", &CallLine::newest)
      .def_prop_ro("in_the_way", &CallLine::in_the_way)
      .def("begin", &CallLine::begin)
      .def("end", &CallLine::end, "sequence"_a)
      .def("restart", &CallLine::restart, "newest"_a)
      .def("seat", &CallLine::seat, "members"_a)
      .def("reading", &CallLine::reading, "sequence"_a)
      .def("lend", [](CallLine& self, nb::object tensor, uint64_t sequence) { self.loans.add(std::move(tensor), sequence); },
           "tensor"_a, "sequence"_a)
      .def_prop_ro("changed_loan", [](const CallLine& self) { return self.loans.changed(); })
      .def("take_back", &CallLine::take_back);
}

}  // namespace commfuse
