"""DistilBERT as a plugin of lorax-core. Importing it is light: `plugin` declares, `modeling` computes."""

__version__ = "0.1.0"
