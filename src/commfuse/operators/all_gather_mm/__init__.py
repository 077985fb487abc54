"""Matmul fused with a collective: all-gather, reduce-scatter, all-reduce; and the group barrier."""
