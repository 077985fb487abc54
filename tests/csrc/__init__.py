"""The C++ core through its bindings. Its own tests, without Python, are in csrc/tests and run by ctest."""
