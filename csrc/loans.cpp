#include "loans.h"

#include <algorithm>
#include <iterator>
#include <utility>

namespace nb = nanobind;

namespace commfuse {

namespace {

nb::object get(nb::handle object, PyObject* name) {
  PyObject* const value = PyObject_GetAttr(object.ptr(), name);
  if (!value) throw nb::python_error();
  return nb::steal(value);
}

// How often a tensor has been changed.
int64_t version_of(nb::handle tensor) {
  static PyObject* const name = PyUnicode_InternFromString("_version");
  return nb::cast<int64_t>(get(tensor, name));
}

bool requires_grad(nb::handle tensor) {
  static PyObject* const name = PyUnicode_InternFromString("requires_grad");
  return get(tensor, name).is(Py_True);
}

}  // namespace

void Loans::add(nb::object tensor, uint64_t sequence) {
  if (requires_grad(tensor)) tensor = tensor.attr("detach")();  // not to keep a graph alive
  const int64_t version = version_of(tensor);
  all_.push_back({std::move(tensor), version, sequence});
}

uint64_t Loans::changed() const {
  const auto found = std::find_if(all_.begin(), all_.end(), [](const Loan& one) { return version_of(one.tensor) != one.version; });
  return found == all_.end() ? 0 : found->sequence;
}

void Loans::take_back(const Channel& channel) {
  std::vector<Loan> over;  // whose tensors may come to an end only when the list is whole again
  const auto end = std::stable_partition(all_.begin(), all_.end(), [&](const Loan& one) { return !channel.all_reached(kConsumed, one.sequence); });
  std::move(end, all_.end(), std::back_inserter(over));
  all_.erase(end, all_.end());
}

}  // namespace commfuse
