"""Native code: compiled once for this machine, checked for owner and mode before it is loaded, tried before it is used."""
