"""Native code: compiled once for this machine, tried before it is trusted."""
