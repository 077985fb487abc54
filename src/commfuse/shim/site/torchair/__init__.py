"""commfuse's look-alike of torchair; importable only under ``commfuse run``."""

from commfuse import shim

shim.install()

from commfuse.shim.torchair import CompilerConfig as CompilerConfig  # noqa: E402
from commfuse.shim.torchair import get_npu_backend as get_npu_backend  # noqa: E402
