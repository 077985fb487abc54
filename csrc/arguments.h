// The arguments of one call, and whether another call has the same: tensors by form, everything else by value.
#pragma once
#include <nanobind/nanobind.h>

#include <vector>

#include "tensors.h"

namespace commfuse {

class Arguments {
 public:
  // `sample`: by name. Throws Error on a tensor that is not dense, and on an argument whose value could change.
  Arguments(const TensorType& type, const nanobind::dict& sample);

  bool match(const nanobind::dict& args);

  // Where the tensor `name` of the call that was matched last begins.
  const void* const* data(const char* name) const;
  // The same for a tensor that need not be given: null then.
  const void* const* data_or_none(const char* name) const;
  size_t ndim(const char* name) const;

 private:
  struct Slot {
    nanobind::object name, value;
    bool is_tensor = false;
    TensorForm form;
    const void* data = nullptr;
  };
  const Slot* find(const char* name) const;
  Slot slot(nanobind::handle name, nanobind::handle value) const;
  bool same(Slot& slot, PyObject* value) const;

  const TensorType& type_;
  std::vector<Slot> slots_;
};

}  // namespace commfuse
