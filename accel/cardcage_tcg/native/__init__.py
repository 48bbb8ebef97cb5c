"""C sources of the native half, and their build script."""
