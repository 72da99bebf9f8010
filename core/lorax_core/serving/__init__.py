"""What users of an engine meet: loading, requests, results and streams."""
