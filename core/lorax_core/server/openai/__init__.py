"""OpenAI's API, with the parameters that vLLM adds to it."""
