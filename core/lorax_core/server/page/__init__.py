"""The page in a browser, and the numbers that it shows."""
