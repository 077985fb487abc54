#include "rows_kernels.h"

namespace commfuse {
extern const Kernels kPlainKernels;
const Kernels kPlainKernels = COMMFUSE_KERNELS("plain");
}  // namespace commfuse
