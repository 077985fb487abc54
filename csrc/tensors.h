// Tensors of the caller's framework, read and made through DLPack's exchange table: nothing of torch is linked.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "arena.h"

namespace commfuse {

struct TensorForm {
  nanobind::dlpack::dtype dtype;
  std::vector<int64_t> shape;
  uint64_t num_bytes() const;
};

// Addresses of lent memory whose tensors are gone. They come back at any moment, in any thread.
class Returned {
 public:
  void put(uint64_t address);
  bool empty() const { return !any_.load(std::memory_order_acquire); }
  std::vector<uint64_t> take();

 private:
  std::mutex mutex_;
  std::atomic<bool> any_{false};
  std::vector<uint64_t> addresses_;
};

// The table that a tensor type offers as __dlpack_c_exchange_api__.
class TensorType {
 public:
  // Throws a Python exception when the type has no such table, or one of a version that is not known here.
  explicit TensorType(nanobind::handle type);
  // Whether `object` is of exactly this type: what a subclass does with its memory is its own.
  bool is(nanobind::handle object) const { return Py_TYPE(object.ptr()) == type_; }
  // False when it cannot be looked at.
  bool look(nanobind::handle tensor, nanobind::dlpack::dltensor* out) const;
  // A new tensor, not initialised; its memory is `*data`.
  nanobind::object make(const TensorForm& form, void** data) const;
  // A tensor over memory of `arena`, which stays while the tensor does; then `address` goes to `returned` (null: nobody is told).
  nanobind::object lend(const TensorForm& form, uint64_t address, std::shared_ptr<Arena> arena,
                        std::shared_ptr<Returned> returned) const;

 private:
  nanobind::object object(void* managed) const;
  PyTypeObject* type_;
  nanobind::object keep_;
  const struct ExchangeTable* table_;
};

// The form of a tensor of `shape` with the dtype of `sample`.
TensorForm form_of(const TensorType& type, std::vector<int64_t> shape, nanobind::handle sample);

// Dense, row after row, on the CPU.
bool is_dense(const nanobind::dlpack::dltensor& tensor);
bool has_form(const nanobind::dlpack::dltensor& tensor, const TensorForm& form);

}  // namespace commfuse
