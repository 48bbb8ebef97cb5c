"""C sources of ``_native.so``, by which requests of a disk are served, and what compiles them."""
