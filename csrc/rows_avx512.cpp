#include "rows_kernels.h"

namespace commfuse {
extern const Kernels kAvx512Kernels;
const Kernels kAvx512Kernels = COMMFUSE_KERNELS("avx512");
}  // namespace commfuse
