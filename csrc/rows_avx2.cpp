#include "rows_kernels.h"

namespace commfuse {
extern const Kernels kAvx2Kernels;
const Kernels kAvx2Kernels = COMMFUSE_KERNELS("avx2");
}  // namespace commfuse
