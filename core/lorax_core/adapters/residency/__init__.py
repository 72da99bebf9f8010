"""Which adapters an engine has, and where they are: on the device, in host memory, on disk."""
