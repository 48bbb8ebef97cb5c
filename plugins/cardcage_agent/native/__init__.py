"""C sources of the guest agent, and how they are built."""
