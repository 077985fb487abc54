// Slabs as tensors of the caller's framework.
#pragma once
#include <memory>
#include <utility>

#include "error.h"
#include "slabs.h"
#include "tensors.h"

namespace commfuse {

class WindowSlabs : public Slabs {
 public:
  WindowSlabs(nanobind::handle tensor_type, std::shared_ptr<Arena> arena, Tell on_large_tail)
      : Slabs(std::move(arena), std::move(on_large_tail)), type_(tensor_type) {
    returned = [gone = gone_] { return gone->empty() ? std::vector<uint64_t>() : gone->take(); };
  }

  const TensorType& type() const { return type_; }
  // A tensor over `slab`, which comes back when the last alias of the tensor is gone.
  nanobind::object lend(Slab& slab, const TensorForm& form) {
    hold(slab);
    try {
      return type_.lend(form, slab.address, arena(), gone_);
    } catch (...) {
      let_go(slab);
      throw;
    }
  }

  // A tensor over `slab` from `begin` on, for use while the slab is taken.
  nanobind::object view(const Slab& slab, uint64_t begin, const TensorForm& form) const {
    return type_.lend(form, slab.address + begin, arena(), nullptr);
  }

 protected:
  // Other threads of the interpreter go on meanwhile.
  void fill(const Slab& slab, uint64_t num_bytes) override {
    const nanobind::gil_scoped_release no_gil;
    Slabs::fill(slab, num_bytes);
  }

 private:
  TensorType type_;
  std::shared_ptr<Returned> gone_ = std::make_shared<Returned>();
};

}  // namespace commfuse
