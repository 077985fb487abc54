#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bind.h"
#include "channel.h"
#include "door.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace commfuse {

bool python_interrupted() {
  const nb::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;
}

namespace {

// The whole reserved range as one buffer, so that torch.frombuffer(arena) gives a tensor that keeps the arena alive.
template <typename T>
int get_buffer(PyObject* self, Py_buffer* view, int flags) {
  try {
    auto* window = nb::inst_ptr<T>(nb::handle(self));
    window->check_process();
    const bool is_readonly = std::is_same_v<T, Peer>;
    return PyBuffer_FillInfo(view, self, window->base(), static_cast<Py_ssize_t>(window->max_bytes()), is_readonly, flags);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_BufferError, error.what());
    return -1;
  }
}

template <typename T>
PyType_Slot* buffer_slots() {
  static PyType_Slot slots[] = {{Py_bf_getbuffer, reinterpret_cast<void*>(get_buffer<T>)}, {0, nullptr}};
  return slots;
}

std::vector<std::shared_ptr<Peer>> exchange(Door& door, int rank, const std::vector<std::string>& names, nb::bytes token,
                                            double timeout_s) {
  const std::string secret(token.c_str(), token.size());
  const nb::gil_scoped_release no_gil;
  return door.exchange(rank, names, secret, static_cast<int64_t>(timeout_s * 1e9), python_interrupted);
}

}  // namespace

void bind_window(nb::module_& module) {
  nb::class_<Mapping>(module, "Window")
      .def_prop_ro("address", [](const Mapping& self) { self.check_process(); return reinterpret_cast<uint64_t>(self.base()); })
      .def_prop_ro("max_bytes", &Mapping::max_bytes)
      .def_prop_ro("control_bytes", &Mapping::control_bytes)
      .def_prop_ro("size", [](const Mapping& self) { self.check_process(); return self.size(); })
      .def("at", [](const Mapping& self, uint64_t offset, uint64_t num_bytes) {
        return reinterpret_cast<uint64_t>(self.at(offset, num_bytes));
      }, "offset"_a, "num_bytes"_a)
      .def("prefault_read", &Mapping::prefault_read, "offset"_a, "num_bytes"_a, nb::call_guard<nb::gil_scoped_release>());

  nb::class_<Arena, Mapping>(module, "Arena", nb::type_slots(buffer_slots<Arena>()))
      .def(nb::init<uint64_t, uint64_t>(), "max_bytes"_a, "control_bytes"_a)
      .def("grow", &Arena::grow, "num_bytes"_a)
      .def("populate", &Arena::populate, "offset"_a, "num_bytes"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("punch", &Arena::punch, "offset"_a, "num_bytes"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("show_to_children", &Arena::show_to_children, "offset"_a, "num_bytes"_a)
      .def("allocated_bytes", nb::overload_cast<>(&Arena::allocated_bytes, nb::const_))
      .def("allocated_bytes", nb::overload_cast<uint64_t, uint64_t>(&Arena::allocated_bytes, nb::const_), "offset"_a,
           "num_bytes"_a)
      .def("offset_of", &Arena::offset_of, "address"_a, "num_bytes"_a)
      .def_prop_rw("limit_bytes", &Arena::limit, &Arena::set_limit)
      .def("make_control", [](Arena& self, uint64_t group_id, uint32_t header_bytes, uint32_t depth) {
        return Channel::make_control(self, group_id, header_bytes, depth);
      }, "group_id"_a, "header_bytes"_a, "depth"_a);

  nb::class_<Peer, Mapping>(module, "Peer", nb::type_slots(buffer_slots<Peer>()))
      .def_prop_ro("pid", &Peer::pid)
      .def_prop_ro("alive", &Peer::alive);

  nb::class_<Door>(module, "Door")
      .def(nb::init<std::shared_ptr<Arena>>(), "arena"_a)
      .def_prop_ro("name", &Door::name)
      .def("exchange", &exchange, "rank"_a, "names"_a, "token"_a, "timeout_s"_a);

  module.attr("TOKEN_BYTES") = kTokenBytes;
  module.attr("PAGE_BYTES") = kPageBytes;
  module.def("available_memory", &available_memory, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace commfuse
