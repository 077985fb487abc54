"""The protocol of the windows as a small machine, and every order in which its ranks can take their steps: docs/protocol.md."""
