"""The other place at which scripts find the configuration."""

from commfuse.shim.torchair import CompilerConfig as CompilerConfig
