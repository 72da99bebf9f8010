"""`lorax plugins new`: a package for an architecture of transformers, written from what a tiny instance of it computes."""
