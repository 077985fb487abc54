#include "arguments.h"

#include "error.h"

namespace nb = nanobind;

namespace commfuse {

namespace {

const void* begin_of(const nb::dlpack::dltensor& tensor) { return static_cast<const uint8_t*>(tensor.data) + tensor.byte_offset; }

}  // namespace

Arguments::Arguments(const TensorType& type, const nb::dict& sample) : type_(type) {
  for (const auto& [name, value] : sample) slots_.push_back(slot(name, value));
}

bool Arguments::match(const nb::dict& args) {
  PyObject *name = nullptr, *value = nullptr;
  Py_ssize_t at = 0;
  size_t i = 0;
  for (; PyDict_Next(args.ptr(), &at, &name, &value); i++)
    if (i >= slots_.size() || slots_[i].name.ptr() != name || !same(slots_[i], value)) return false;
  return i == slots_.size();
}

const void* const* Arguments::data(const char* name) const {
  const Slot* found = find(name);
  if (!found) fail("no tensor %s", name);
  return &found->data;
}

const void* const* Arguments::data_or_none(const char* name) const {
  static const void* const none = nullptr;
  const Slot* found = find(name);
  return found ? &found->data : &none;
}

size_t Arguments::ndim(const char* name) const {
  const Slot* found = find(name);
  return found ? found->form.shape.size() : 0;
}

const Arguments::Slot* Arguments::find(const char* name) const {
  for (const Slot& one : slots_)
    if (one.is_tensor && PyUnicode_CompareWithASCIIString(one.name.ptr(), name) == 0) return &one;
  return nullptr;
}

Arguments::Slot Arguments::slot(nb::handle name, nb::handle value) const {
  Slot result{nb::borrow(name), nb::borrow(value)};
  nb::dlpack::dltensor seen;
  if (type_.is(value)) {
    if (!type_.look(value, &seen) || !is_dense(seen)) fail("a tensor that is not dense");
    result.is_tensor = true;
    result.form = {seen.dtype, {seen.shape, seen.shape + seen.ndim}};
    result.data = begin_of(seen);
    result.value.reset();
  } else if (!value.is_none() && !nb::isinstance<nb::str>(value) && !nb::isinstance<nb::int_>(value)) {
    fail("an argument that could change");
  }
  return result;
}

bool Arguments::same(Slot& slot, PyObject* value) const {
  if (slot.is_tensor) {
    nb::dlpack::dltensor seen;
    if (!type_.is(value) || !type_.look(value, &seen) || !has_form(seen, slot.form) || !is_dense(seen)) return false;
    slot.data = begin_of(seen);
    return true;
  }
  PyObject* const mine = slot.value.ptr();
  if (mine == value) return true;
  if (Py_TYPE(mine) != Py_TYPE(value)) return false;
  const int equal = PyObject_RichCompareBool(mine, value, Py_EQ);
  if (equal < 0) PyErr_Clear();
  return equal == 1;
}

}  // namespace commfuse
