#include "bind.h"

#include "error.h"

namespace nb = nanobind;
using namespace commfuse;

NB_MODULE(_core, module) {
  module.doc() = "The C++ core: windows, counters, keys, rows. Addresses are plain ints. See _core.pyi.";
  const auto error = nb::exception<Error>(module, "CoreError", PyExc_RuntimeError);
  nb::exception<OutOfMemory>(module, "CoreMemoryError", error);
  nb::register_exception_translator([](const std::exception_ptr& exception, void*) {
    try {
      std::rethrow_exception(exception);
    } catch (const Interrupted&) {
      // The Python exception that interrupted us is pending already.
    }
  });
  nb::set_leak_warnings(false);  // tensors over an arena rightly live until the very end of a program
  bind_window(module);
  bind_channel(module);
  bind_calls(module);
  bind_rows(module);
  bind_repeat(module);
}
