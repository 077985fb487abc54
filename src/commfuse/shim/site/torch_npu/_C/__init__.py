"""Only for the names that scripts reach through it."""

from . import _distributed_c10d as _distributed_c10d
