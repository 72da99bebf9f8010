"""The API of text-embeddings-inference, below /tei."""
