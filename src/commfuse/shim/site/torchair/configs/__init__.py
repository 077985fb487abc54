"""The package of `compiler_config`."""
