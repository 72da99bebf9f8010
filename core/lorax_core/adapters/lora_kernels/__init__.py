"""How the low-rank products of many adapters are computed: adapter by adapter in torch, or all in one native call."""
