#include "tensors.h"

#include <cstdlib>
#include <cstring>
#include <utility>

#include "error.h"

namespace nb = nanobind;

namespace commfuse {

namespace {

constexpr uint32_t kMajor = 1, kMinor = 1;
constexpr int32_t kCpu = 1;
constexpr uint64_t kAlign = 64;

struct Version {
  uint32_t major, minor;
};

// As the DLPack standard lays it out.
struct Managed {
  Version version;
  void* context;
  void (*deleter)(Managed*);
  uint64_t flags;
  nb::dlpack::dltensor tensor;
};

// What stands before the data of a tensor that is made here, and for itself for one that is lent.
struct Head {
  Managed managed;
  void* block;  // what malloc gave; this lies at its first aligned place
  std::shared_ptr<Arena> arena;
  std::shared_ptr<Returned> returned;
  int64_t sizes[1];  // shape, then strides
};

void drop(Managed* managed) {
  auto* head = reinterpret_cast<Head*>(managed);
  if (head->returned) head->returned->put(reinterpret_cast<uint64_t>(managed->tensor.data));
  void* const block = head->block;
  head->~Head();
  std::free(block);
}

uint64_t head_bytes(const TensorForm& form) {
  return (sizeof(Head) + 2 * form.shape.size() * sizeof(int64_t) + kAlign - 1) / kAlign * kAlign;
}

Head* make_head(const TensorForm& form, uint64_t num_bytes) {
  void* const block = std::malloc(num_bytes + kAlign);  // faster than aligned_alloc, which keeps nothing for the next call
  if (!block) throw std::bad_alloc();
  auto* head = new (reinterpret_cast<void*>((reinterpret_cast<uint64_t>(block) + kAlign - 1) / kAlign * kAlign)) Head{};
  head->block = block;
  const size_t ndim = form.shape.size();
  int64_t* const strides = head->sizes + ndim;
  int64_t step = 1;
  for (size_t i = ndim; i-- > 0; step *= form.shape[i]) {
    head->sizes[i] = form.shape[i];
    strides[i] = step;
  }
  head->managed = {{kMajor, kMinor}, nullptr, drop, 0,
                   {nullptr, {kCpu, 0}, static_cast<int32_t>(ndim), form.dtype, head->sizes, strides, 0}};
  return head;
}

}  // namespace

struct ExchangeTable {
  Version version;
  ExchangeTable* before;
  void* allocate;
  void* to_managed;
  int (*to_object)(Managed*, void** object);
  int (*look)(void* object, nb::dlpack::dltensor* out);
  void* stream;
};

uint64_t TensorForm::num_bytes() const {
  uint64_t count = 1;
  for (int64_t size : shape) count *= static_cast<uint64_t>(size);
  return count * (uint64_t(dtype.bits) * dtype.lanes / 8);
}

TensorType::TensorType(nb::handle type) : type_(reinterpret_cast<PyTypeObject*>(type.ptr())), keep_(nb::borrow(type)) {
  const nb::object capsule = type.attr("__dlpack_c_exchange_api__");
  table_ = static_cast<const ExchangeTable*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!table_) throw nb::python_error();
  while (table_ && table_->version.major != kMajor) table_ = table_->before;
  if (!table_ || !table_->look || !table_->to_object) fail("tensors of this type do not exchange by DLPack %u", kMajor);
}

bool TensorType::look(nb::handle tensor, nb::dlpack::dltensor* out) const {
  if (table_->look(tensor.ptr(), out) == 0) return true;
  PyErr_Clear();
  return false;
}

nb::object TensorType::make(const TensorForm& form, void** data) const {
  const uint64_t before = head_bytes(form);
  Head* head = make_head(form, before + form.num_bytes());
  *data = head->managed.tensor.data = reinterpret_cast<uint8_t*>(head) + before;
  return object(&head->managed);
}

nb::object TensorType::lend(const TensorForm& form, uint64_t address, std::shared_ptr<Arena> arena,
                            std::shared_ptr<Returned> returned) const {
  arena->offset_of(address, form.num_bytes());
  Head* head = make_head(form, head_bytes(form));
  head->managed.tensor.data = reinterpret_cast<void*>(address);
  head->arena = std::move(arena);
  head->returned = std::move(returned);
  return object(&head->managed);
}

nb::object TensorType::object(void* managed) const {
  void* made = nullptr;
  if (table_->to_object(static_cast<Managed*>(managed), &made) != 0) throw nb::python_error();
  return nb::steal(static_cast<PyObject*>(made));
}

void Returned::put(uint64_t address) {
  const std::lock_guard<std::mutex> lock(mutex_);
  addresses_.push_back(address);
  any_.store(true, std::memory_order_release);
}

std::vector<uint64_t> Returned::take() {
  const std::lock_guard<std::mutex> lock(mutex_);
  any_.store(false, std::memory_order_release);
  return std::exchange(addresses_, {});
}

TensorForm form_of(const TensorType& type, std::vector<int64_t> shape, nb::handle sample) {
  nb::dlpack::dltensor seen;
  if (!type.is(sample) || !type.look(sample, &seen)) fail("not a tensor that can be looked at");
  return {seen.dtype, std::move(shape)};
}

bool is_dense(const nb::dlpack::dltensor& tensor) {
  if (tensor.device.device_type != kCpu) return false;
  if (!tensor.strides) return true;
  int64_t step = 1;
  for (int32_t i = tensor.ndim; i-- > 0; step *= tensor.shape[i])
    if (tensor.shape[i] != 1 && tensor.strides[i] != step) return false;
  return true;
}

bool has_form(const nb::dlpack::dltensor& tensor, const TensorForm& form) {
  return static_cast<size_t>(tensor.ndim) == form.shape.size() && tensor.dtype == form.dtype &&
         std::memcmp(tensor.shape, form.shape.data(), form.shape.size() * sizeof(int64_t)) == 0;
}

}  // namespace commfuse
