"""The face that users meet: loading, requests, results and streams."""
