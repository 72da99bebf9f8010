"""The HTTP server: one engine behind the interfaces of OpenAI, LoRAX and TEI (the extra `lorax-core[server]`)."""
