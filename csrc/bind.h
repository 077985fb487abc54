// The rooms of the Python module, one bind_* each.
#pragma once
#include <nanobind/nanobind.h>

#include <cstdint>

namespace commfuse {

void bind_window(nanobind::module_& module);
void bind_channel(nanobind::module_& module);
void bind_calls(nanobind::module_& module);
void bind_rows(nanobind::module_& module);
void bind_repeat(nanobind::module_& module);

// True when a Python signal handler has raised: the exception is then pending in this thread.
bool python_interrupted();

template <typename T>
T* pointer(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace commfuse
